"""One training through several numbers of ranks and ZeRO stages, and through kills: no sample lost, none repeated."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfoundry.pipeline.errors import MmfoundryError
from mmfoundry.pipeline.metrics import read_metrics
from mmfoundry.pipeline.ranks import start_ranks
from tests.pipeline.tiny_training import train_tiny, trainer_config
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
MODULE = "tests.pipeline.one_rank"


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def config(stage: int, **changes: Any) -> dict[str, Any]:
    return {"trainer": trainer_config(zero_optimization={"stage": stage}, **changes)}


def test_two_ranks_then_one_then_four_and_from_zero_1_to_3(tmp_path: Path) -> None:
    joint = train_tiny(None, str(tmp_path / "joint"), config(0))
    assert not isinstance(joint, int | str)
    out = str(tmp_path / "out")
    assert run_ranks(train_tiny, 2, out, config(1), ("SIGTERM", 1, 1)) == [85, 85]
    assert train_tiny(None, out, config(1), ("SIGTERM", 3, 0)) == 85
    for losses, weights in run_ranks(train_tiny, 4, out, config(3)):
        torch.testing.assert_close(losses, joint[0], rtol=1e-5, atol=1e-5)
        for name in joint[1].keys() - {"calls"}:
            torch.testing.assert_close(weights[name], joint[1][name], rtol=1e-5, atol=2e-6)


def rows_by_step(folder: Path) -> dict[int, list[str]]:
    """The rows of each step over all ranks, as its last attempt had them."""
    attempts: dict[int, dict[str, list[str]]] = {}
    for file in sorted(folder.glob("seen-*-of-*.jsonl"), key=lambda file: file.stat().st_mtime):
        for line in file.read_text().splitlines():
            step, keys = json.loads(line)
            attempts.setdefault(step, {})[file.name] = keys
    return {step: sorted(key for keys in each.values() for key in keys) for step, each in attempts.items()}


@pytest.mark.slow
@pytest.mark.parametrize("lost", [-1, 0, 1])
def test_killed_at_random_steps_it_ends_as_if_never_killed(lost: int, tmp_path: Path) -> None:
    """One rank of two, or all of them, at seven random steps of twenty."""
    training = {
        **config(1, max_steps=20, save_steps=2, heartbeat={"silence_timeout_s": 20}),
        "dropout": 0.3,
    }
    whole = run_ranks(train_tiny, 2, str(tmp_path / "whole"), training)[0]
    out = tmp_path / "run" / "out"
    out.parent.mkdir()
    for step in sorted(random.Random(lost).sample(range(1, 20), 7)):
        with pytest.raises(MmfoundryError, match="run again to go on from the last checkpoint"):
            start_ranks(MODULE, [str(out), json.dumps(training), "SIGKILL", str(step), str(lost)], 2)
        assert not out.exists()
    start_ranks(MODULE, [str(out), json.dumps(training)], 2)
    assert [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line] == whole[0]
    weights = torch.load(out / "model.pt", weights_only=True)
    assert all(torch.equal(weights[name], value) for name, value in whole[1].items())
    seen = rows_by_step(out.parent)
    assert {step: rows for step, rows in seen.items() if step <= 20} == {
        step: sorted(f"row-{row}" for row in range(12 * step - 12, 12 * step)) for step in range(1, 21)
    }
