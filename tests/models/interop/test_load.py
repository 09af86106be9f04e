"""models/interop/load.py: the same model out of each of the three layouts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from mmfoundry.models.interop.load import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, load_any_clip
from mmfoundry.models.interop.open_clip import to_open_clip_config, to_open_clip_state
from mmfoundry.models.interop.transformers_clip import to_transformers_config, to_transformers_state
from mmfoundry.models.io import save_clip
from mmfoundry.pipeline.errors import DamagedInput, MissingInput
from tests.models.tiny import pairs, tiny_clip


@pytest.mark.parametrize("layout", ["ours", "transformers", "open_clip"])
def test_each_layout(layout: str, tmp_path: Path) -> None:
    model = tiny_clip(quick_gelu=True)
    if layout == "ours":
        save_clip(model, tmp_path)
    elif layout == "transformers":
        theirs = CLIPModel(CLIPConfig(**to_transformers_config(model.config)))
        theirs.load_state_dict(to_transformers_state(model))
        theirs.save_pretrained(tmp_path)
    else:
        (tmp_path / OPEN_CLIP_CONFIG).write_text(json.dumps(to_open_clip_config(model.config)))
        save_file(to_open_clip_state(model), tmp_path / OPEN_CLIP_WEIGHTS)
    loaded, batch = load_any_clip(tmp_path), pairs(4)
    assert loaded.config.quick_gelu
    torch.testing.assert_close(loaded(batch).image_bD, model(batch).image_bD)
    torch.testing.assert_close(loaded(batch).text_bD, model(batch).text_bD)


def test_what_is_not_a_clip(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no CLIP here"):
        load_any_clip(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DamagedInput, match="neither one of our CLIPs"):
        load_any_clip(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(to_transformers_config(tiny_clip().config)))
    with pytest.raises(MissingInput, match="safetensors only"):
        load_any_clip(tmp_path)
