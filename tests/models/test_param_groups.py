"""Rates by tower and by layer: who learns how fast."""

import pytest
import torch

from mmfoundry.models.open_clip_model import OpenClip
from mmfoundry.models.param_groups import TowerRate, TowerRates, clip_param_groups
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.optimizers import decay_groups
from tests.models.tiny import tiny_clip
from tests.models.tiny_open_clip import config


def rate_of(groups: list[dict], parameter: torch.nn.Parameter) -> float:
    found = [group for group in groups if any(each is parameter for each in group["params"])]
    assert len(found) == 1  # each parameter in one group
    return found[0]["lr_scale"]


def test_without_rates_the_groups_are_those_of_always() -> None:
    """Order and content: what is summed in another order gives other bits."""
    model = tiny_clip()
    always = decay_groups(model.named_parameters(), 0.1, model.no_weight_decay())
    for ours, theirs in zip(clip_param_groups(model, 0.1), always, strict=True):
        assert [id(each) for each in ours["params"]] == [id(each) for each in theirs["params"]]
        assert {**ours, "params": 0} == {**theirs, "params": 0}


def test_layers_learn_slower_towards_the_input() -> None:
    model = tiny_clip()
    rates = TowerRates(image=TowerRate(lr_scale=0.5, layer_decay=0.8), text=TowerRate(lr_scale=2.0, layer_decay=0.1))
    groups = clip_param_groups(model, 0.1, rates)
    vision, text = model.vision_model, model.text_model
    expected = {
        vision.embeddings.patch_embedding.weight: 0.5 * 0.8**4,
        vision.embeddings.class_embedding: 0.5 * 0.8**4,
        vision.pre_layrnorm.weight: 0.5 * 0.8**4,
        vision.encoder.layers[0].mlp.fc1.weight: 0.5 * 0.8**3,
        vision.encoder.layers[2].self_attn.q_proj.bias: 0.5 * 0.8,
        vision.post_layernorm.weight: 0.5,
        model.visual_projection.weight: 0.5,
        text.embeddings.token_embedding.weight: 2 * 0.1**3,
        text.encoder.layers[1].layer_norm1.bias: 2 * 0.1,
        text.final_layer_norm.weight: 2.0,
        model.text_projection.weight: 2.0,
        model.logit_scale: 1.0,
    }
    for parameter, rate in expected.items():
        torch.testing.assert_close(rate_of(groups, parameter), rate)
    grouped = [id(each) for group in groups for each in group["params"]]
    assert sorted(grouped) == sorted(id(each) for each in model.parameters())
    spared = {id(each) for group in groups if group["weight_decay"] == 0 for each in group["params"]}
    assert spared == {id(each) for name, each in model.named_parameters() if name in model.no_weight_decay()}
    assert {group["part"] for group in groups} == {"image", "text", "joint"}


def test_layers_of_open_clip_are_the_groups_of_its_lock() -> None:
    rates = TowerRates(image=TowerRate(lr_scale=0.5, layer_decay=0.8), text=TowerRate(layer_decay=0.1))
    model = OpenClip.from_seed(config("siglip"), 0)
    model.open_clip.text.ln_final.requires_grad_(False)
    groups = clip_param_groups(model, 0.1, rates)
    vision, text = model.open_clip.visual, model.open_clip.text
    expected = {
        vision.conv1.weight: 0.5 * 0.8**3,
        vision.transformer.resblocks[0].mlp.c_fc.weight: 0.5 * 0.8**2,
        vision.transformer.resblocks[1].ln_1.bias: 0.5 * 0.8,
        vision.ln_post.weight: 0.5 * 0.8,
        vision.proj: 0.5,
        text.token_embedding.weight: 0.1**3,
        text.transformer.resblocks[0].attn.in_proj_weight: 0.1**2,
        text.text_projection.weight: 1.0,
        model.logit_scale: 1.0,
    }
    for parameter, rate in expected.items():
        torch.testing.assert_close(rate_of(groups, parameter), rate)
    learns = {id(each) for group in groups for each in group["params"]}
    assert learns == {id(each) for each in model.parameters()} - {id(each) for each in text.ln_final.parameters()}
    convnext = OpenClip.from_seed(config("convnext"), 0)  # timm's groups; the projection behind its trunk has none
    groups = clip_param_groups(convnext, 0.1, TowerRates(image=TowerRate(layer_decay=0.5)))
    assert rate_of(groups, convnext.open_clip.visual.head.proj.weight) == 1
    assert rate_of(groups, convnext.open_clip.visual.trunk.stem[0].weight) == 0.5**13
    for kind, message in (
        ("resnet", "ModifiedResNet in groups: partial"),
        ("coca", "groups leave 9 parameters of its"),
    ):
        with pytest.raises(ConfigError, match=rf"towers\.image\.layer_decay: open_clip.*{message}"):
            clip_param_groups(OpenClip.from_seed(config(kind), 0), 0.1, TowerRates(image=TowerRate(layer_decay=0.5)))


def test_what_is_no_hidden_matrix_can_stand_apart() -> None:
    model = tiny_clip()
    groups = clip_param_groups(model, 0.1, hidden_apart=True)
    matrices = {id(each) for group in groups if group["matrices"] for each in group["params"]}
    encoders = (model.vision_model.encoder, model.text_model.encoder)
    assert matrices == {id(each) for encoder in encoders for each in encoder.parameters() if each.ndim == 2}
