"""models/interop/transformers_clip.py: the same logits as transformers' CLIPModel, both ways."""

import pytest
import torch
from transformers import CLIPConfig as HFConfig
from transformers import CLIPModel

from mmfoundry.models.interop.transformers_clip import (
    from_transformers,
    from_transformers_config,
    to_transformers_config,
    to_transformers_state,
)
from mmfoundry.pipeline.errors import ConfigError
from tests.models.tiny import pairs, tiny_clip


def their_logits(model: CLIPModel, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, pixel_values=pixels).logits_per_image


def our_logits(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        output = model(batch)
    return output.scale * output.image_bD @ output.text_bD.T


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_ours_in_theirs(quick_gelu: bool) -> None:
    ours, batch = tiny_clip(quick_gelu=quick_gelu), pairs(6)
    theirs = CLIPModel(HFConfig(**to_transformers_config(ours.config))).eval()
    theirs.load_state_dict(to_transformers_state(ours))  # strict: every name is the same
    expected = our_logits(ours, batch)
    assert expected.std() > 0.1
    torch.testing.assert_close(
        their_logits(theirs, ours.pixels(batch["image"]), batch["text"]), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("eos_token_id", [49, 2])
def test_theirs_in_ours(eos_token_id: int) -> None:
    torch.manual_seed(0)
    tree = to_transformers_config(tiny_clip(quick_gelu=True).config)
    tree["text_config"]["eos_token_id"] = eos_token_id  # 2: what old configs say, pooled at the highest id
    theirs = CLIPModel(HFConfig(**tree)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    ours, batch = from_transformers(theirs.config.to_dict(), theirs.state_dict()), pairs(6)
    expected = their_logits(theirs, ours.pixels(batch["image"]), batch["text"])
    torch.testing.assert_close(our_logits(ours, batch), expected, atol=1e-5, rtol=0)


def test_hidden_states_are_theirs() -> None:
    ours, batch = tiny_clip(), pairs(3)
    theirs = CLIPModel(HFConfig(**to_transformers_config(ours.config))).eval()
    theirs.load_state_dict(to_transformers_state(ours))
    pixels = ours.pixels(batch["image"])
    with torch.no_grad():
        states = theirs.vision_model(pixels, output_hidden_states=True).hidden_states
        for layer in range(-4, 4):
            torch.testing.assert_close(ours.vision_tokens(pixels, layer), states[layer][:, 1:], atol=1e-5, rtol=0)


def test_scale_is_written_as_it_acts() -> None:
    ours, batch = tiny_clip(), pairs(4)
    with torch.no_grad():
        ours.logit_scale.fill_(6.0)  # past its limit: acts as log(100)
    theirs = CLIPModel(HFConfig(**to_transformers_config(ours.config))).eval()
    theirs.load_state_dict(to_transformers_state(ours))
    expected = our_logits(ours, batch)
    torch.testing.assert_close(
        their_logits(theirs, ours.pixels(batch["image"]), batch["text"]), expected, atol=1e-4, rtol=0
    )
    with torch.no_grad():
        theirs.logit_scale.fill_(5.0)
    again = from_transformers(theirs.config.to_dict(), theirs.state_dict())
    assert again.config.max_logit_scale is None
    torch.testing.assert_close(again.scale(), torch.tensor(5.0).exp())


def test_config_round_trip_and_refusals() -> None:
    config = tiny_clip().config
    tree = HFConfig(**to_transformers_config(config)).to_dict()
    assert from_transformers_config(tree) == config
    for tower, key, value in (
        ("text_config", "hidden_act", "relu"),
        ("vision_config", "hidden_act", "quick_gelu"),
        ("vision_config", "layer_norm_eps", 1e-6),
        ("text_config", "eos_token_id", 7),
    ):
        with pytest.raises(ConfigError, match=key):
            from_transformers_config({**tree, tower: {**tree[tower], key: value}})
    with pytest.raises(ConfigError, match="no logit bias"):
        to_transformers_config(tiny_clip(init_logit_bias=0.0).config)
    with pytest.raises(ConfigError, match="no logit bias"):
        to_transformers_state(tiny_clip(init_logit_bias=0.0))
