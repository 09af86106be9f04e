"""models/adapters/lora.py: only what is named is adapted; merged, saved and loaded it computes the same."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmfoundry.models.adapters.lora import LoraSettings, add_lora, load_lora, lora_layers, merge_lora, save_lora
from mmfoundry.pipeline.errors import DamagedInput, MissingInput
from tests.models.tiny import pairs, tiny_clip
from tests.models.tiny_vlm import tiny_vlm

BLOCKS = "model.language_model.layers"


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2)


def output(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        return model.lm_head(model.model.language_model(input_ids=ids).last_hidden_state)


def test_only_what_is_named() -> None:
    model, _ = tiny_vlm()
    add_lora(model, LoraSettings(rank=2, modules=["q_proj", "up_proj"], first_layer=1), BLOCKS, seed=0)
    names = [name for name, _ in lora_layers(model)]
    expected = [f"{BLOCKS}.{layer}.{part}" for layer in (1, 2) for part in ("self_attn.q_proj", "mlp.up_proj")]
    assert names == expected
    assert all("lora_" in name for name, weight in model.named_parameters() if weight.requires_grad)


def test_untrained_adapters_change_nothing_and_come_from_the_seed() -> None:
    model, _ = tiny_vlm()
    expected = output(model)
    state = torch.get_rng_state()
    add_lora(model, LoraSettings(rank=2), BLOCKS, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output(model), expected)
    other, _ = tiny_vlm()
    add_lora(other, LoraSettings(rank=2), BLOCKS, seed=1)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_save_load_merge(tmp_path: Path) -> None:
    model, _ = tiny_vlm()
    plain = output(model)
    config = add_lora(model, LoraSettings(rank=3, alpha=5.0), BLOCKS, seed=0)
    disturb(model)
    adapted = output(model)
    assert (adapted - plain).abs().max() > 0.1
    save_lora(model, config, tmp_path, base="somewhere/vlm")
    other, _ = tiny_vlm()
    load_lora(other, tmp_path)
    assert torch.equal(output(other), adapted)
    names = {name for name, _ in other.named_parameters()}
    assert merge_lora(other) is other
    torch.testing.assert_close(output(other), adapted, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in other.named_parameters()} == {name for name, _ in tiny_vlm()[0].named_parameters()}
    assert names != {name for name, _ in other.named_parameters()}


def test_a_clip_takes_them_too() -> None:
    model = tiny_clip()
    with torch.no_grad():
        plain = model(pairs(3)).image_bD
        add_lora(model, LoraSettings(rank=2, modules=["v_proj", "fc1"]), "vision_model.encoder.layers", seed=0)
        disturb(model)
        adapted = model(pairs(3)).image_bD
    assert (adapted - plain).abs().max() > 1e-3
    assert all(
        name.startswith("vision_model.encoder") for name, weight in model.named_parameters() if weight.requires_grad
    )


def test_no_such_module() -> None:
    with pytest.raises(ValueError, match="not found"):
        add_lora(tiny_vlm()[0], LoraSettings(modules=["fc9"]), BLOCKS, seed=0)


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no adapter"):
        load_lora(tiny_vlm()[0], tmp_path)
    model, _ = tiny_vlm()
    config = add_lora(model, LoraSettings(rank=3), BLOCKS, seed=0)
    save_lora(model, config, tmp_path, base="")
    assert all(
        name.startswith(f"base_model.model.{BLOCKS}") for name in load_file(tmp_path / "adapter_model.safetensors")
    )
    with pytest.raises((DamagedInput, ValueError), match=r"adapter|not found"):
        load_lora(tiny_clip(), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(DamagedInput, match="cannot be read"):
        load_lora(tiny_vlm()[0], tmp_path)
