"""models/interop/open_clip.py: the same logits as open_clip's CLIP, both ways."""

import open_clip
import pytest
import torch

from mmfoundry.models.clip import CLIP
from mmfoundry.models.interop.open_clip import (
    from_open_clip,
    from_open_clip_config,
    named_config,
    to_open_clip_config,
    to_open_clip_state,
)
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, UnknownName
from tests.models.tiny import pairs, tiny_clip


def their_logits(model: open_clip.CLIP, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().get_logits(pixels, tokens)[0]


def our_logits(model: CLIP, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        output = model(batch)
    return output.scale * output.image_bD @ output.text_bD.T + (0 if output.bias is None else output.bias)


TEXT = {"context_length": 9, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2, "norm_kwargs": {"eps": 1e-3}}
VISION = {"image_size": 16, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8}
CHANGES = [
    {},
    {"quick_gelu": True},
    {"init_logit_bias": -10.0},
    {"text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}},
    {"text_cfg": {**TEXT, "no_causal_mask": True, "act_kwargs": {"approximate": "tanh"}}},
    {"text_cfg": {**TEXT, "pool_type": "last"}, "vision_cfg": {**VISION, "norm_kwargs": {"eps": 1e-3}}},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_ours_in_theirs(changes: dict) -> None:
    ours, batch = tiny_clip(**changes), pairs(6)
    theirs = open_clip.CLIP(**to_open_clip_config(ours.config)["model_cfg"])
    theirs.load_state_dict(to_open_clip_state(ours))
    expected = our_logits(ours, batch)
    assert expected.std() > 0.1
    pixels = ours.pixels(batch["image"])
    torch.testing.assert_close(their_logits(theirs, pixels, batch["text"]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_theirs_in_ours(changes: dict) -> None:
    model_cfg = to_open_clip_config(tiny_clip(**changes).config)["model_cfg"]
    torch.manual_seed(0)
    theirs = open_clip.CLIP(**model_cfg)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    ours, batch = from_open_clip(model_cfg, theirs.state_dict()), pairs(6)
    expected = their_logits(theirs, ours.pixels(batch["image"]), batch["text"])
    torch.testing.assert_close(our_logits(ours, batch), expected, atol=1e-5, rtol=0)
    again = to_open_clip_state(ours)
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, again[name]) for name, value in theirs.state_dict().items())


def test_one_of_their_named_configs() -> None:
    model_cfg = open_clip.get_model_config("ViT-S-32-alt")
    with torch.device("meta"):
        theirs, ours = open_clip.CLIP(**model_cfg), CLIP(from_open_clip_config(model_cfg))
    assert sum(each.numel() for each in theirs.parameters()) == sum(each.numel() for each in ours.parameters())


def test_config_round_trip_and_refusals() -> None:
    config = tiny_clip(preprocess_cfg={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}).config
    written = to_open_clip_config(config)
    preprocess = {**written["preprocess_cfg"], "interpolation": "bicubic"}
    assert from_open_clip_config(written["model_cfg"], preprocess) == config
    with pytest.raises(ConfigError, match=r"vision_cfg\.timm_model_name is not a known key"):
        from_open_clip_config({"embed_dim": 8, "vision_cfg": {"timm_model_name": "vit_tiny"}})
    with pytest.raises(ConfigError, match="custom_text"):
        from_open_clip_config({"embed_dim": 8, "custom_text": True})
    state = to_open_clip_state(tiny_clip())
    with pytest.raises(DamagedInput, match=r"visual\.head is not a weight of open_clip's plain CLIP"):
        from_open_clip(written["model_cfg"], {**state, "visual.head": torch.zeros(1)})
    del state["visual.transformer.resblocks.1.attn.in_proj_bias"]
    with pytest.raises(DamagedInput, match=r"vision_model\.encoder\.layers\.1\.self_attn\.[kqv]_proj\.bias is missing"):
        from_open_clip(written["model_cfg"], state)


def test_a_model_by_its_name_has_their_config_and_size() -> None:
    for name, millions in (("ViT-S-32-alt", 43.22), ("ViT-B-16", 149.62), ("ViT-L-14-336-quickgelu", 427.94)):
        config = named_config(name)
        assert config == from_open_clip_config(open_clip.get_model_config(name))
        with torch.device("meta"):
            parameters = sum(weight.numel() for weight in CLIP(config).parameters())
        assert parameters / 1e6 == pytest.approx(millions, abs=0.01)  # open_clip's docs/model_profile.csv


def test_a_name_that_is_not_theirs_or_not_a_plain_clip_is_refused() -> None:
    with pytest.raises(UnknownName, match=r"no model 'ViT-B-23'; near: ViT-B-32"):
        named_config("ViT-B-23")
    with pytest.raises(ConfigError, match=r"open_clip's RN50"):
        named_config("RN50")
