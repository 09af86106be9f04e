"""Steps that would spoil the weights are stopped at, left out, or answered with a lower learning rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.guard import NON_FINITE, SPIKE, Guard, GuardConfig, LossSpike, NonFinite
from tests.pipeline.tiny_training import train_tiny, trainer_config
from tests.ranks import run_ranks

BAD = 12 * 4 + 1  # a row of step 5, of rank 1 where there are two
WATCHFUL = {"spike_window_steps": 3, "spike_deviations": 8.0}


def guard(folder: Path, **changes: Any) -> tuple[Guard, list[str]]:
    said: list[str] = []
    return Guard(parse(GuardConfig, changes), Runtime(), folder, "train", said.append), said


def test_what_is_a_spike(tmp_path: Path) -> None:
    watch, _ = guard(tmp_path, spike="skip", spike_window_steps=20, spike_deviations=5.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(200):
        loss = 5 - step * 0.01 + 0.1 * torch.randn((), generator=generator).item()
        assert watch.trouble(loss) is None, step  # falls, with noise
        watch.accept(loss)
    assert watch.trouble(3.5) is None
    assert watch.trouble(4.5) == SPIKE
    assert watch.trouble(float("nan")) == watch.trouble(float("inf")) == NON_FINITE
    other, _ = guard(tmp_path, spike="skip", spike_window_steps=20, spike_deviations=5.0)
    assert other.trouble(1e9) is None  # nothing to compare with yet
    other.load_state_dict(watch.state_dict())
    assert (other.trouble(3.5), other.trouble(4.5)) == (None, SPIKE)
    off, _ = guard(tmp_path)
    off.load_state_dict(watch.state_dict())
    assert off.trouble(1e9) is None


def test_the_rate_comes_back_after_a_spike(tmp_path: Path) -> None:
    watch, said = guard(tmp_path, spike="back_off", back_off_factor=0.5, back_off_steps=4)
    batch: dict[str, Any] = {"__key__": ["a", "b"]}
    watch.answer(SPIKE, "loss", 9.0, 3, [batch], [torch.tensor(9.0)])
    assert watch.caution == 0.5
    assert "train step 3: the loss is 9.0, where 0 is usual, on rank(s) 0 with the samples a, b" in said[0]
    assert "the learning rate is multiplied with 0.5; its update is left out" in said[0]
    assert json.loads((tmp_path / "spike-train-000003.json").read_text())["ranks"][0]["keys"] == ["a", "b"]
    rates = []
    for _ in range(5):
        watch.accept(1.0)
        rates.append(watch.caution)
    assert rates == [0.625, 0.75, 0.875, 1.0, 1.0]


def test_too_many_in_a_row_stop_the_run(tmp_path: Path) -> None:
    watch, said = guard(tmp_path, non_finite="skip", max_skipped_in_a_row=2)
    for step in (1, 2):
        watch.answer(NON_FINITE, "loss", float("nan"), step, [{}], [torch.tensor(0.0)])
    with pytest.raises(NonFinite, match=r"2 updates in a row were left out before it"):
        watch.answer(NON_FINITE, "loss", float("nan"), 3, [{}], [torch.tensor(0.0)])
    assert len(said) == 2
    strict, _ = guard(tmp_path, spike="stop")
    with pytest.raises(LossSpike, match="the weights were not touched"):
        strict.answer(SPIKE, "loss", 3.0, 1, [{}], [torch.tensor(3.0)])


def config(stage: int = 0, leap: float | None = None, **of_guard: Any) -> dict[str, Any]:
    trainer = trainer_config(zero_optimization={"stage": stage}, guard=of_guard)
    return {"trainer": trainer, "bad": BAD, "leap": leap}


@pytest.fixture(scope="module")
def left_out(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_tiny(None, str(tmp_path_factory.mktemp("one") / "out"), config(non_finite="skip"))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("leap", [None, 40.0])
def test_a_step_is_left_out_alike_at_every_stage(stage: int, leap: float | None, left_out: Any, tmp_path: Path) -> None:
    """Not finite, or far too high: the update is left out and nothing else, so both give the same weights."""
    of_guard = {"non_finite": "skip"} if leap is None else {"spike": "skip", **WATCHFUL}
    for run in run_ranks(train_tiny, 2, str(tmp_path / "out"), config(stage, leap, **of_guard)):
        assert not isinstance(run, int | str), run
        for name in run[1].keys() - {"calls"}:
            torch.testing.assert_close(run[1][name], left_out[1][name], rtol=1e-5, atol=2e-6)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines if "loss" in line] == [0] * 4 + [1] * 4
    name = f"{'non_finite' if leap is None else 'spike'}-train-000005.json"
    assert "row-49" in json.loads((tmp_path / "out" / name).read_text())["ranks"][1]["keys"]


def test_the_step_left_out_would_have_mattered(left_out: Any, tmp_path: Path) -> None:
    unwatched = train_tiny(None, str(tmp_path / "out"), config(leap=40.0))
    assert not isinstance(unwatched, int | str)
    assert (unwatched[1]["mix.weight"] - left_out[1]["mix.weight"]).abs().max() > 1e-3


def test_a_stopped_run_goes_on_without_the_step(left_out: Any, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    error = train_tiny(None, out, config())
    assert isinstance(error, str)
    assert "guard.non_finite=skip goes on from the last checkpoint" in error
    again = train_tiny(None, out, config(non_finite="skip", max_skipped_in_a_row=0))
    assert isinstance(again, str)
    assert "guard.max_skipped_in_a_row allows more" in again
    run = train_tiny(None, out, config(non_finite="skip"))
    assert not isinstance(run, int | str)
    assert "goes on from the checkpoint of step 3" in (tmp_path / "out" / "messages.txt").read_text()
    for name, weight in left_out[1].items():
        assert torch.equal(run[1][name], weight), name


def test_a_spike_can_stop_the_run(tmp_path: Path) -> None:
    error = train_tiny(None, str(tmp_path / "out"), config(leap=40.0, spike="stop", **WATCHFUL))
    assert isinstance(error, str)
    assert "train step 5: the loss is " in error
    assert "is usual, on rank(s) 0 with the samples row-48, row-49" in error


def test_what_it_learnt_is_in_the_checkpoint(tmp_path: Path) -> None:
    watched = config(leap=40.0, spike="back_off", **WATCHFUL)
    whole = train_tiny(None, str(tmp_path / "whole"), watched)
    assert train_tiny(None, str(tmp_path / "out"), watched, ("SIGTERM", 3, 0)) == 85
    assert train_tiny(None, str(tmp_path / "out"), watched, ("SIGTERM", 5, 0)) == 85
    again = train_tiny(None, str(tmp_path / "out"), watched)
    assert not isinstance(whole, int | str)
    assert not isinstance(again, int | str)
    assert whole[0] == again[0]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[5]["lr"] < 0.6 * lines[4]["lr"]
