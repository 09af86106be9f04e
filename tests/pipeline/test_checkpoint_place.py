"""Where checkpoints go and which are left: the best one, one that is written beside the training, no place at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmfoundry.pipeline import checkpoint
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.tensor_file import TensorFile
from mmfoundry.pipeline.trainer_config import TrainerConfig
from tests.pipeline.tiny_training import train_tiny, trainer_config
from tests.ranks import run_ranks

FOLDER = Path("out.work") / "checkpoints" / "train"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("world", [1, 2])
def test_the_best_is_kept_and_is_what_the_phase_ends_with(world: int, tmp_path: Path) -> None:
    """The tiny stage's evaluation gives the square of the step: where less is better, the first is the best."""
    trainer = trainer_config(
        eval_steps=2,
        save_steps=3,
        keep_checkpoints=1,
        metric_for_best_model="step_squared",
        load_best_model_at_end=True,
    )

    def run(*args: Any) -> Any:
        return (run_ranks(train_tiny, world, *args) if world > 1 else [train_tiny(None, *args)])[0]

    assert run(str(tmp_path / "out"), {"trainer": trainer}, ("SIGTERM", 6, 0)) == 85
    assert names(tmp_path / FOLDER) == ["step-000002", "step-000007"]
    state = json.loads((tmp_path / FOLDER / "step-000002" / "state.json").read_text())
    assert state["metrics"]["step_squared"] == 4
    expected = load_file(tmp_path / FOLDER / "step-000002" / "model.safetensors")
    _, weights = run(str(tmp_path / "out"), {"trainer": trainer})
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert "ends with the weights of step 2, the best" in (tmp_path / "out" / "messages.txt").read_text()


def test_where_greater_is_better_the_last_is_the_best(tmp_path: Path) -> None:
    trainer = trainer_config(
        eval_steps=2, save_steps=0, keep_checkpoints=1, metric_for_best_model="step_squared", greater_is_better=True
    )
    assert train_tiny(None, str(tmp_path / "out"), {"trainer": trainer}, ("SIGTERM", 6, 0)) == 85
    assert names(tmp_path / FOLDER) == ["step-000006", "step-000007"]


def test_what_best_needs() -> None:
    base = {"train_batch_size": 2, "max_steps": 2}
    with pytest.raises(ConfigError, match="metric_for_best_model needs eval_steps"):
        parse(TrainerConfig, base | {"metric_for_best_model": "x"})
    with pytest.raises(ConfigError, match="load_best_model_at_end needs metric_for_best_model"):
        parse(TrainerConfig, base | {"load_best_model_at_end": True})
    averaged = {"eval_steps": 1, "ema": {"decay": 0.5}, "metric_for_best_model": "recall/ema"}
    parse(TrainerConfig, base | averaged)
    with pytest.raises(ConfigError, match=r"recall/ema is the average's: name the metric without /ema"):
        parse(TrainerConfig, base | averaged | {"load_best_model_at_end": True})


def test_an_unknown_number_is_named(tmp_path: Path) -> None:
    error = train_tiny(
        None, str(tmp_path / "out"), {"trainer": trainer_config(eval_steps=2, metric_for_best_model="recall")}
    )
    assert error == "metric_for_best_model: no evaluation gives recall; there are: norm, step_squared, training"


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_written_beside_the_steps_it_holds_the_step_it_is_of(stage: int, tmp_path: Path) -> None:
    def run(name: str, *args: Any, **changes: Any) -> Any:
        trainer = trainer_config(save_steps=1, zero_optimization={"stage": stage}, **changes)
        config = {"trainer": trainer, "dropout": 0.3}
        output = str(tmp_path / name)
        return (
            run_ranks(train_tiny, 2, output, config, *args) if stage else [train_tiny(None, output, config, *args)]
        )[0]

    whole = run("whole")
    assert run("out", ("SIGTERM", 4, 0), save_async=True) == 85
    again = run("out", save_async=True)
    assert again[0] == whole[0]
    assert all(torch.equal(again[1][name], value) for name, value in whole[1].items())


def test_a_full_disk_is_told_of_when_it_was_written_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = TensorFile.add

    def full(file: TensorFile, name: str, tensor: torch.Tensor) -> None:
        if "step-000006" in file.path.parts[-2]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, name, tensor)

    monkeypatch.setattr(TensorFile, "add", full)
    error = train_tiny(None, str(tmp_path / "out"), {"trainer": trainer_config(save_async=True)})
    assert isinstance(error, str)
    assert "no space left for a checkpoint" in error
    assert names(tmp_path / FOLDER) == ["step-000003"]


def test_a_folder_that_cannot_be_written_is_told_of_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / FOLDER).parent.mkdir(parents=True)
    real = checkpoint.write_atomic

    def read_only(path: Path, data: Any) -> None:
        if path.name == ".writable":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        real(path, data)

    monkeypatch.setattr(checkpoint, "write_atomic", read_only)
    error = train_tiny(None, str(tmp_path / "out"), {"trainer": trainer_config()})
    assert isinstance(error, str)
    assert "cannot write a checkpoint to" in error
    assert "read-only file system; the previous one is untouched" in error
    assert not (tmp_path / "out.work" / "metrics.jsonl").exists()
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(3))
    error = train_tiny(None, str(tmp_path / "out"), {"trainer": trainer_config()})
    assert "no space left for a checkpoint" in str(error)
    assert not (tmp_path / "out.work" / "metrics.jsonl").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, tmp_path: Path) -> None:
    config = {"trainer": trainer_config(keep_checkpoints=1), "dropout": 0.3}
    whole = train_tiny(None, str(tmp_path / "whole"), config)
    out = small_disk / "out"
    assert train_tiny(None, str(out), config, ("SIGTERM", 2, 0)) == 85
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 12_000))  # room for a line of the log only
    error = train_tiny(None, str(out), config)
    assert isinstance(error, str)
    assert "no space left" in error
    assert [name for name in names(small_disk / FOLDER) if not name.endswith(".tmp")] == ["step-000003"]
    filler.unlink()
    again = train_tiny(None, str(out), config)
    assert not isinstance(whole, int | str)
    assert not isinstance(again, int | str)
    assert again[0] == whole[0]
