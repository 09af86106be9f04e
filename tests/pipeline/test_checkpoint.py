"""The checkpoint's files: whole or passed over, pruned, readable by safetensors alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmfoundry.pipeline import checkpoint
from mmfoundry.pipeline.distributed import init_runtime
from mmfoundry.pipeline.errors import DamagedInput
from tests.pipeline.tiny_training import TinyLanguageModel, train_tiny, trainer_config

CONFIG = {"trainer": trainer_config(max_steps=5, save_steps=1, keep_checkpoints=3)}


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a run that was told to stop after four of five steps."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert train_tiny(None, str(out), CONFIG, ("SIGTERM", 3, 0)) == 85
    return out.with_name("out.work")


@pytest.fixture
def folder(cut_off: Path, tmp_path: Path) -> Path:
    """A copy of its checkpoints that a test may spoil."""
    return shutil.copytree(cut_off / "checkpoints" / "train", tmp_path / "train")


def newest(folder: Path) -> tuple[int | None, list[str]]:
    said: list[str] = []
    found = checkpoint.newest(folder, init_runtime(), said.append)
    return (None if found is None else found.step), said


def test_old_ones_are_removed(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000003", "step-000004"]
    assert newest(folder) == (4, [])
    assert newest(folder / "absent") == (None, [])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "rng-0.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "empty"])
def test_a_damaged_one_is_passed_over(name: str, damage: str, folder: Path) -> None:
    file = folder / "step-000004" / name
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    assert newest(folder) == (3, ["checkpoint step-000004 is incomplete and passed over"])


def test_one_that_was_being_written_is_not_seen_and_later_removed(folder: Path, tmp_path: Path, cut_off: Path) -> None:
    (folder / "step-000004").rename(folder / "step-000004.tmp")
    assert newest(folder) == (3, [])
    work = shutil.copytree(cut_off, tmp_path / "out.work")
    shutil.rmtree(work / "checkpoints" / "train")
    shutil.move(folder, work / "checkpoints" / "train")
    assert not isinstance(train_tiny(None, str(tmp_path / "out"), CONFIG), int | str)


def test_files_hold_what_they_say(folder: Path) -> None:
    model = load_file(folder / "step-000004" / "model.safetensors")
    trained = {"embedding.weight", "mix.weight", "mix.bias", "norm.weight", "norm.bias", "scale", "unused"}
    assert model.keys() == trained | {"calls"}  # no frozen weight; the tied one once
    assert model["calls"].item() == 4
    states = load_file(folder / "step-000004" / "optimizer.safetensors")
    assert states.keys() == {f"{name}/{key}" for name in trained for key in ("exp_avg", "exp_avg_sq")}
    state = json.loads((folder / "step-000004" / "state.json").read_text())
    assert state["optimizer"] == {"keys": ["exp_avg", "exp_avg_sq"], "updates": 4.0}
    assert state["loader"] == {"samples_consumed": 48}


def test_a_checkpoint_of_another_model_is_refused(folder: Path) -> None:
    found = checkpoint.newest(folder, init_runtime(), print)
    assert found is not None
    model = TinyLanguageModel()
    model.mix = nn.Linear(6, 5)
    with pytest.raises(DamagedInput, match=r"is of another model: mix.bias, mix.weight"):
        found.load_model(model)


def test_another_number_of_ranks_seeds_afresh(folder: Path) -> None:
    found = checkpoint.newest(folder, init_runtime(), print)
    assert found is not None
    other = checkpoint.Checkpoint(found.path, found.state | {"world_size": 5})

    def draw(source: checkpoint.Checkpoint, seed: int) -> Tensor:
        source.restore_rng(init_runtime(), seed)
        return torch.rand(4)

    assert torch.equal(draw(found, 0), draw(found, 1))
    assert torch.equal(draw(other, 0), draw(other, 0))
    assert not torch.equal(draw(other, 0), draw(other, 1))


def test_damage_that_sizes_do_not_show_is_an_error_of_one_line(folder: Path) -> None:
    found = checkpoint.newest(folder, init_runtime(), print)
    assert found is not None
    file = found.path / "model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    state: Any = newest(folder)
    assert state[0] == 4
    with pytest.raises(DamagedInput, match="remove its folder to go back"):
        found.load_model(TinyLanguageModel())
