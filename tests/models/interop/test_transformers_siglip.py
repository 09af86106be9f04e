"""models/interop/transformers_siglip.py: the same logits as transformers' SiglipModel, both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SiglipConfig, SiglipModel

from mmfoundry.models.interop.build import ratio_of
from mmfoundry.models.interop.load import load_any_clip
from mmfoundry.models.interop.transformers_siglip import (
    from_siglip,
    from_siglip_config,
    to_siglip_config,
    to_siglip_state,
)
from mmfoundry.models.io import load_clip, save_clip
from mmfoundry.pipeline.errors import ConfigError, DamagedInput
from tests.models.tiny import SIGLIP, tiny_clip, tiny_siglip

# vision and text config of shapes that differ in each size, as SigLIP's checkpoints do
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({}, {}),
    "pictures that patches do not fill": ({"image_size": 21, "patch_size": 6}, {"max_position_embeddings": 5}),
    "odd mlp, one layer": (
        {"hidden_size": 36, "intermediate_size": 135, "num_hidden_layers": 1, "num_attention_heads": 3},
        {"hidden_size": 36, "intermediate_size": 135, "num_hidden_layers": 1, "num_attention_heads": 9},
    ),
    "exact gelu, another eps": (
        {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
        {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
    ),
    "text of another width": ({}, {"hidden_size": 16, "projection_size": 24}),
}
TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


def siglip_model(shape: str = "base", seed: int = 0) -> SiglipModel:
    """transformers' model, no weight at its neutral value."""
    vision, text = SHAPES[shape]
    config = SiglipConfig(
        vision_config={**TOWER, "image_size": 16, "patch_size": 8, **vision},
        text_config={**TOWER, "vocab_size": 50, "max_position_embeddings": 7, **text},
    )
    torch.manual_seed(seed)
    model = SiglipModel(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        model.logit_scale.fill_(4.2)
        model.logit_bias.fill_(-12.5)
    return model.eval()


def batch_for(model: SiglipModel, rows: int = 6) -> dict[str, torch.Tensor]:
    side, text = model.config.vision_config.image_size, model.config.text_config
    tokens = torch.randint(2, text.vocab_size, (rows, text.max_position_embeddings))
    for row, ids in enumerate(tokens):
        ids[row % len(ids) + 1 :] = 1  # padding, which is read
    return {"image": torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8), "text": tokens}


def our_logits(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        output = model(batch)
    return output.scale * output.image_bD @ output.text_bD.T + (0 if output.bias is None else output.bias)


def their_logits(model: SiglipModel, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, pixel_values=pixels).logits_per_image


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_of_theirs_in_ours(shape: str, tmp_path: Path) -> None:
    theirs = siglip_model(shape)
    theirs.save_pretrained(tmp_path)
    ours, batch = load_any_clip(tmp_path), batch_for(theirs)
    expected = their_logits(theirs, ours.pixels(batch["image"]), batch["text"])
    assert expected.std() > 0.1
    torch.testing.assert_close(our_logits(ours, batch), expected, atol=2e-5, rtol=0)
    again = to_siglip_state(ours)
    assert again.keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(again[name], value, atol=0, rtol=0 if name != "logit_scale" else 1e-6)
    assert SiglipConfig(**to_siglip_config(ours.config)).to_dict() | {"dtype": None} == theirs.config.to_dict() | {
        "dtype": None
    }


def test_ours_in_theirs() -> None:
    ours = tiny_siglip()
    theirs = SiglipModel(SiglipConfig(**to_siglip_config(ours.config))).eval()
    theirs.load_state_dict(to_siglip_state(ours))  # strict: every name is the same
    batch = batch_for(theirs)
    expected = our_logits(ours, batch)
    assert expected.std() > 0.1
    found = their_logits(theirs, ours.pixels(batch["image"]), batch["text"])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_no_bias_is_one_of_zero_and_the_scale_is_written_as_it_acts() -> None:
    ours = tiny_siglip(init_logit_bias=None)
    with torch.no_grad():
        ours.logit_scale.fill_(9.0)  # past its limit: acts as log(100)
    theirs = SiglipModel(SiglipConfig(**to_siglip_config(ours.config))).eval()
    theirs.load_state_dict(to_siglip_state(ours))
    batch = batch_for(theirs)
    found = their_logits(theirs, ours.pixels(batch["image"]), batch["text"])
    torch.testing.assert_close(found, our_logits(ours, batch), atol=1e-4, rtol=0)


def test_hidden_states_are_theirs() -> None:
    theirs = siglip_model()
    ours = from_siglip(theirs.config.to_dict(), theirs.state_dict())
    pixels = ours.pixels(batch_for(theirs)["image"])
    with torch.no_grad():
        states = theirs.vision_model(pixels, output_hidden_states=True).hidden_states
        for layer in range(-3, 3):
            torch.testing.assert_close(ours.vision_tokens(pixels, layer), states[layer], atol=1e-5, rtol=0)


def test_saved_as_ours_it_is_the_same_model(tmp_path: Path) -> None:
    theirs = siglip_model()
    ours = from_siglip(theirs.config.to_dict(), theirs.state_dict())
    save_clip(ours, tmp_path)
    batch = batch_for(theirs)
    assert torch.equal(our_logits(load_clip(tmp_path), batch), our_logits(ours, batch))


def test_pixels_are_siglips() -> None:
    preprocess = from_siglip_config(siglip_model().config.to_dict()).preprocess_cfg
    assert preprocess.mean == preprocess.std == (0.5, 0.5, 0.5)
    assert preprocess.resize_mode == "squash"


def test_what_is_refused(tmp_path: Path) -> None:
    tree = siglip_model().config.to_dict()
    for tower, key, value in (
        ("text_config", "hidden_act", "relu"),
        ("vision_config", "hidden_act", "quick_gelu"),
        ("vision_config", "vision_use_head", False),
        ("vision_config", "num_channels", 1),
        ("text_config", "projection_size", 12),
    ):
        with pytest.raises(ConfigError, match=key if key != "projection_size" else "embed_dim 12"):
            from_siglip_config({**tree, tower: {**tree[tower], key: value}})
    with pytest.raises(ConfigError, match=r"SiglipModel wants vision_cfg\.pool_type: map"):
        to_siglip_config(tiny_clip().config)
    with pytest.raises(ConfigError, match="no_causal_mask"):
        to_siglip_state(tiny_siglip(text_cfg={**SIGLIP["text_cfg"], "no_causal_mask": False}))
    state = siglip_model().state_dict()
    del state["vision_model.head.probe"]
    with pytest.raises(DamagedInput, match=r"vision_model\.head\.probe is missing"):
        from_siglip(tree, state)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    with pytest.raises(ConfigError, match="NaFlex"):
        load_any_clip(tmp_path)


def test_a_ratio_gives_its_hidden_width_again() -> None:
    for width in range(8, 1600, 8):
        assert all(int(width * ratio_of(hidden, width)) == hidden for hidden in range(width, 5 * width, 13))
