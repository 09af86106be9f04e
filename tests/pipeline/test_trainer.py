"""The loop's promises: one process and many agree, a cut-off run goes on where it was, nothing bad is stepped on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfoundry.pipeline.errors import PREEMPTED_EXIT_CODE
from mmfoundry.pipeline.tensor_file import TensorFile
from tests.pipeline.tiny_training import TinyLoader, TokenLoss, train_tiny, trainer_config
from tests.ranks import run_ranks

Run = tuple[list[float], dict[str, Tensor]]


def assert_same_run(found: Any, expected: Run) -> None:
    """Up to rounding: float32 sums in another order, over eight steps of a large learning rate."""
    losses, weights = found
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected[0]), rtol=1e-5, atol=1e-5)
    assert weights.keys() == expected[1].keys()
    for name, value in weights.items():
        if name != "calls":  # counts forward passes, of which one process makes fewer
            torch.testing.assert_close(value, expected[1][name], rtol=1e-5, atol=2e-6)


def assert_identical_run(found: Any, expected: Run) -> None:
    assert found[0] == expected[0]
    for name, value in expected[1].items():
        assert torch.equal(found[1][name], value), name


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process, the whole batch at once."""
    run = train_tiny(None, str(tmp_path_factory.mktemp("joint") / "out"), {"trainer": trainer_config()})
    assert not isinstance(run, int | str)
    return run


@pytest.fixture(scope="module")
def with_dropout(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process that draws random numbers at every step, never cut off."""
    config = {"trainer": trainer_config(), "dropout": 0.3}
    run = train_tiny(None, str(tmp_path_factory.mktemp("whole") / "out"), config)
    assert not isinstance(run, int | str)
    return run


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world", "micro"), [(2, None), (2, 3), (3, 2)])
def test_any_split_gives_the_joint_run(world: int, micro: int | None, stage: int, joint: Run, tmp_path: Path) -> None:
    config = trainer_config(zero_optimization={"stage": stage}, train_micro_batch_size_per_gpu=micro)
    for run in run_ranks(train_tiny, world, str(tmp_path / "out"), {"trainer": config}):
        assert_same_run(run, joint)


def test_micro_batches_on_one_process_give_the_joint_run(joint: Run, tmp_path: Path) -> None:
    config = trainer_config(train_micro_batch_size_per_gpu=2)
    assert_same_run(train_tiny(None, str(tmp_path / "out"), {"trainer": config}), joint)


def test_weights_of_micro_batches_matter_here(joint: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would pass without them."""
    monkeypatch.delattr(TokenLoss, "weight")
    losses, _ = train_tiny(None, str(tmp_path / "out"), {"trainer": trainer_config(train_micro_batch_size_per_gpu=2)})
    assert max(abs(a - b) for a, b in zip(losses, joint[0], strict=True)) > 1e-3


def test_killed_run_goes_on_bit_for_bit(with_dropout: Run, tmp_path: Path) -> None:
    config = {"trainer": trainer_config(), "dropout": 0.3}
    arguments = repr((str(tmp_path / "out"), config, ("SIGKILL", 5, 0)))
    code = (
        f"from tests.pipeline import tiny_training as t\nt.torch.set_num_threads(1)\nt.train_tiny(None, *{arguments})"
    )
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", code], cwd=root, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    work = tmp_path / "out.work"
    assert [path.name for path in (work / "checkpoints" / "train").iterdir()] == ["step-000003"]
    with (work / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "train", "st')  # as a kill leaves a line
    assert_identical_run(train_tiny(None, str(tmp_path / "out"), config), with_dropout)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_told_to_stop_it_saves_and_exits_with_85(name: str, with_dropout: Run, tmp_path: Path) -> None:
    config = {"trainer": trainer_config(), "dropout": 0.3}
    assert train_tiny(None, str(tmp_path / "out"), config, (name, 4, 0)) == PREEMPTED_EXIT_CODE == 85
    folder = tmp_path / "out.work" / "checkpoints" / "train"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000003", "step-000005"]  # asked during step 5
    assert_identical_run(train_tiny(None, str(tmp_path / "out"), config), with_dropout)


def test_goes_on_with_other_ranks_and_stages(joint: Run, tmp_path: Path) -> None:
    def config(stage: int) -> dict[str, Any]:
        return {"trainer": trainer_config(zero_optimization={"stage": stage})}

    out = str(tmp_path / "out")
    assert train_tiny(None, out, config(0), ("SIGTERM", 1, 0)) == 85
    assert run_ranks(train_tiny, 2, out, config(2), ("SIGTERM", 3, 1)) == [85, 85]  # one rank is told, all stop
    assert run_ranks(train_tiny, 3, out, config(3), ("SIGTERM", 5, 0)) == [85, 85, 85]
    for run in run_ranks(train_tiny, 2, out, config(1)):
        assert_same_run(run, joint)


def test_a_warm_up_that_never_ends_is_told(tmp_path: Path) -> None:
    said = {}
    for steps in (5, 6):
        scheduler, out = {"type": "cosine", "warmup_steps": steps}, tmp_path / str(steps)
        train_tiny(None, str(out), {"trainer": trainer_config(max_steps=6, scheduler=scheduler)})
        messages = out / "messages.txt"
        said[steps] = messages.read_text() if messages.exists() else ""
    assert "6 warmup_steps, of 6 steps: the learning rate rises to the end" in said[6]
    assert "warmup_steps" not in said[5]


def test_a_signal_while_the_run_is_being_built_is_no_death(
    joint: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = {"trainer": trainer_config()}, str(tmp_path / "out")
    assert train_tiny(None, out, config, ("SIGTERM", 2, 0)) == 85
    unheard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: unheard.append(number))
    load = TinyLoader.load_state_dict

    def told_meanwhile(loader: TinyLoader, state: dict[str, Any]) -> None:
        load(loader, state)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TinyLoader, "load_state_dict", told_meanwhile)
    try:
        assert train_tiny(None, out, config) == 85
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not unheard
    assert "saved at step 3" in (tmp_path / "out.work" / "messages.txt").read_text()
    monkeypatch.setattr(TinyLoader, "load_state_dict", load)
    assert_same_run(train_tiny(None, out, config), joint)


def test_ranks_go_on_bit_for_bit_on_as_many(tmp_path: Path) -> None:
    config = {"trainer": trainer_config(zero_optimization={"stage": 1}), "dropout": 0.3}
    whole = run_ranks(train_tiny, 2, str(tmp_path / "whole"), config)
    assert run_ranks(train_tiny, 2, str(tmp_path / "out"), config, ("SIGTERM", 4, 0)) == [85, 85]
    assert_identical_run(run_ranks(train_tiny, 2, str(tmp_path / "out"), config)[0], whole[0])


@pytest.mark.parametrize("world", [1, 2])
def test_loss_that_is_not_finite_stops_every_rank(world: int, tmp_path: Path) -> None:
    config = {"trainer": trainer_config(), "bad": 12 * 4 + 1}  # a row of step 5, of rank 1 where there are two
    out = str(tmp_path / "out")
    errors = run_ranks(train_tiny, world, out, config) if world > 1 else [train_tiny(None, out, config)]
    for error in errors:
        assert "train step 5: the loss is nan on rank(s) " + str(world - 1) in error
        assert "row-49" in error
    work = tmp_path / "out.work"
    assert json.loads((work / "non_finite-train-000005.json").read_text())["step"] == 5
    assert len((work / "metrics.jsonl").read_text().splitlines()) == 4
    assert [path.name for path in (work / "checkpoints" / "train").iterdir()] == ["step-000003"]


def test_gradient_that_is_not_finite_stops_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def root_at_zero(loss: TokenLoss, output: Tensor, batch: Any, group: Any = None) -> dict[str, Tensor]:
        return {"loss": (output * 0).square().sum().sqrt()}

    monkeypatch.setattr(TokenLoss, "__call__", root_at_zero)
    error = train_tiny(None, str(tmp_path / "out"), {"trainer": trainer_config()})
    assert "train step 1: the gradient is nan on rank(s) 0 with the samples row-0, row-1" in error
    assert error.count("row-") == 8
    assert "and 4 more" in error
    assert not list((tmp_path / "out.work").glob("checkpoints/*/*"))


def test_the_log_has_every_step_and_evaluations(joint: Run, tmp_path: Path) -> None:
    config = {"trainer": trainer_config(eval_steps=4, logging_steps=3)}
    assert_identical_run(train_tiny(None, str(tmp_path / "out"), config), joint)  # evaluating changes nothing
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert all({"lr", "grad_norm", "tokens_seen"} <= line.keys() for line in steps)
    assert [line["lr"] for line in steps[:3]] == pytest.approx([0.025, 0.05, 0.05])  # two steps of warm-up
    timed = [line["step"] for line in steps if {"samples_per_second", "data_wait_share"} <= line.keys()]
    assert timed == [3, 6, 8]
    evaluations = [
        (line["step"], line["eval/step_squared"], line["eval/training"]) for line in lines if line not in steps
    ]
    assert evaluations == [(4, 16, 0), (8, 64, 0)]
    metrics = json.loads((tmp_path / "out" / "manifest.json").read_text())["metrics"]
    assert metrics["loss"] == joint[0][-1] == metrics["mean_loss"]  # a twentieth of eight steps is one
    assert (metrics["steps"], metrics["samples"]) == (8, 96)


def test_evaluations_leave_random_numbers_alone(with_dropout: Run, tmp_path: Path) -> None:
    config = {"trainer": trainer_config(eval_steps=1), "dropout": 0.3}
    assert_identical_run(train_tiny(None, str(tmp_path / "out"), config), with_dropout)
    cut = str(tmp_path / "cut")
    assert train_tiny(None, cut, config, ("SIGTERM", 4, 0)) == PREEMPTED_EXIT_CODE
    assert_identical_run(train_tiny(None, cut, config), with_dropout)


def test_full_disk_leaves_the_previous_checkpoint(
    with_dropout: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"trainer": trainer_config(), "dropout": 0.3}
    write = TensorFile.add

    def full(file: TensorFile, name: str, tensor: Tensor) -> None:
        if "step-000006" in file.path.parts[-2] and name == "mix.weight":
            raise OSError(28, os.strerror(28))
        write(file, name, tensor)

    monkeypatch.setattr(TensorFile, "add", full)
    error = train_tiny(None, str(tmp_path / "out"), config)
    assert "no space left for a checkpoint" in error
    assert "\n" not in error
    folder = tmp_path / "out.work" / "checkpoints" / "train"
    assert [path.name for path in folder.iterdir()] == ["step-000003"]
    monkeypatch.undo()
    assert_identical_run(train_tiny(None, str(tmp_path / "out"), config), with_dropout)
