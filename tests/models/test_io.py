"""models/io.py: what is saved loads again, and what is damaged says so."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmfoundry.models.clip import CLIP
from mmfoundry.models.io import CONFIG_FILE, WEIGHTS_FILE, load_clip, save_clip, untrained_clip
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput
from tests.models.tiny import pairs, tiny_clip, tiny_config


def test_round_trip(tmp_path: Path) -> None:
    model = tiny_clip(init_logit_bias=-10.0)
    save_clip(model, tmp_path)
    loaded = load_clip(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    assert all(each.requires_grad for each in loaded.parameters())
    expected, output = model(pairs(3)), loaded(pairs(3))
    for name in ("image_bD", "text_bD", "scale", "bias"):
        assert torch.equal(getattr(output, name), getattr(expected, name))


def test_untrained(tmp_path: Path) -> None:
    start = CLIP.from_seed(tiny_config(), 7)
    trained = CLIP.from_seed(tiny_config(), 8)
    save_clip(trained, tmp_path, seed=7)
    for name, value in untrained_clip(tmp_path).state_dict().items():
        assert torch.equal(value, start.state_dict()[name])
    save_clip(trained, tmp_path)
    with pytest.raises(MissingInput, match="init_seed is not set"):
        untrained_clip(tmp_path)


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"config\.json: no such file"):
        load_clip(tmp_path)
    save_clip(tiny_clip(), tmp_path)
    weights, config = tmp_path / WEIGHTS_FILE, tmp_path / CONFIG_FILE
    state = load_file(weights)
    save_file({name: value for name, value in state.items() if name != "logit_scale"}, weights)
    with pytest.raises(DamagedInput, match="logit_scale is missing"):
        load_clip(tmp_path)
    save_file({**state, "extra": torch.zeros(1), "logit_scale": torch.zeros(2)}, weights)
    with pytest.raises(DamagedInput, match=r"extra is not known; logit_scale is \(2,\), not \(\)"):
        load_clip(tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DamagedInput, match="not a whole safetensors file"):
        load_clip(tmp_path)
    weights.unlink()
    with pytest.raises(MissingInput, match=r"model\.safetensors: no such file"):
        load_clip(tmp_path)
    record = json.loads(config.read_text())
    record["model"]["embed_dimm"] = 3
    config.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="embed_dimm is not a known key; did you mean embed_dim"):
        load_clip(tmp_path)
    config.write_text("{")
    with pytest.raises(DamagedInput, match="not JSON"):
        load_clip(tmp_path)
    config.write_text("{}")
    with pytest.raises(DamagedInput, match="not the config of one of our CLIPs"):
        load_clip(tmp_path)
