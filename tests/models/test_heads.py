"""models/heads.py: heads as LAION and DataComp publish them give what their networks give, from safetensors."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mmfoundry.models.heads import load_head, width_of
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput

EMBEDDINGS = torch.nn.functional.normalize(torch.randn(7, 12, generator=torch.Generator().manual_seed(0)), dim=1)


def saved(model: nn.Module, path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return path


def test_one_linear_layer_as_in_aesthetic_v1(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(12, 1)
    head = load_head(saved(model, tmp_path / "v1.safetensors"))
    torch.testing.assert_close(head(EMBEDDINGS), model(EMBEDDINGS)[:, 0])
    assert width_of(head) == 12


def test_numbered_layers_without_activation_as_in_aesthetic_v2(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Predictor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # eleven modules, so that 10 would come before 2 in the order of letters
            widths = [12, 12, 12, 12, 12, 1]
            parts: list[nn.Module] = []
            for before, after in pairwise(widths):
                parts += [nn.Linear(before, after), nn.Dropout(0.2)]
            self.layers = nn.Sequential(nn.Dropout(0.1), nn.Identity(), *parts)

    model = Predictor().eval()
    head = load_head(saved(model, tmp_path / "v2.safetensors"))
    torch.testing.assert_close(head(EMBEDDINGS), model.layers(EMBEDDINGS)[:, 0])


def nsfw() -> nn.Sequential:
    """DataComp's NSFW classifier, narrower."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("norm", nn.BatchNorm1d(12, eps=0.0))
    for name, before, after in (("dense", 12, 8), ("dense1", 8, 12), ("dense2", 12, 5), ("dense3", 5, 1)):
        model.add_module(name, nn.Linear(before, after))
        model.add_module(f"{name}_act", nn.Sigmoid() if after == 1 else nn.ReLU())
    model.norm.running_mean.copy_(torch.randn(12))
    model.norm.running_var.copy_(torch.rand(12) + 0.5)
    return model.eval()


def test_normalisation_activation_and_sigmoid_as_in_the_nsfw_classifier(tmp_path: Path) -> None:
    model = nsfw()
    file = saved(model, tmp_path / "nsfw.safetensors")
    order = ["norm", "dense", "dense1", "dense2", "dense3"]
    head = load_head(file, layers=order, activation="relu", output="sigmoid")
    torch.testing.assert_close(head(EMBEDDINGS), model(EMBEDDINGS)[:, 0])
    with pytest.raises(ConfigError, match=r"norm wants 12 numbers, but 1 come"):
        load_head(file, activation="relu", output="sigmoid")  # by the names' numbers the norm would come last


def test_one_of_several_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(12, 3)
    file = saved(model, tmp_path / "kinds.safetensors")
    head = load_head(file, output="softmax", output_index=2)
    torch.testing.assert_close(head(EMBEDDINGS), model(EMBEDDINGS).softmax(1)[:, 2])
    with pytest.raises(ConfigError, match="output_index is 3, but there are 3 outputs"):
        load_head(file, output_index=3)


def test_files_that_are_no_heads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="safetensors only"):
        load_head(tmp_path / "no.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x80\x04pickled")
    with pytest.raises(DamagedInput, match="not a whole safetensors file"):
        load_head(broken)
    save_file({"conv.weight": torch.zeros(2, 3, 1, 1)}, tmp_path / "conv.safetensors")
    with pytest.raises(ConfigError, match=r"conv \(weight \(2, 3, 1, 1\)\) is neither"):
        load_head(tmp_path / "conv.safetensors")
    file = saved(nn.Linear(12, 1), tmp_path / "one.safetensors")
    with pytest.raises(ConfigError, match="layers must name each of"):
        load_head(file, layers=["dense"])
