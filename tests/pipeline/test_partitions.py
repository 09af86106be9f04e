"""Norms by part of the model are the same numbers, whatever the ZeRO stage left on each rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.tiny_training import train_tiny, trainer_config
from tests.ranks import run_ranks

PARTS = ["embedding", "mix", "norm", "scale", "unused"]


def norms(folder: Path) -> dict[str, list[float]]:
    """Each norm that was logged, step by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            if "_norm" in name:
                found.setdefault(name, []).append(value)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Those of one process, which has all numbers."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert not isinstance(train_tiny(None, str(folder), {"trainer": trainer_config(logging_steps=3)}), int | str)
    found = norms(folder)
    assert sorted(found) == sorted(["grad_norm", *(f"{kind}_norm/{p}" for kind in ("grad", "param") for p in PARTS)])
    assert len(found["grad_norm"]) == 8
    assert all(len(values) == 3 for name, values in found.items() if "/" in name)
    assert len(set(found["param_norm/mix"])) == 3
    assert min(found["grad_norm/mix"] + found["grad_norm/scale"]) > 1e-3
    assert found["grad_norm/unused"] == [0.0] * 3
    return found


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        (0, {}),
        (1, {}),
        (2, {}),
        (3, {}),
        (2, {"train_micro_batch_size_per_gpu": 3}),
        (2, {"offload_optimizer": {"device": "cpu"}}),
        (3, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
    ],
)
def test_every_stage_logs_the_norms_of_one_process(
    stage: int, more: dict[str, Any], whole: dict[str, list[float]], tmp_path: Path
) -> None:
    zero = {"stage": stage} | {key: value for key, value in more.items() if key.startswith("offload")}
    rest = {key: value for key, value in more.items() if not key.startswith("offload")}
    config = {"trainer": trainer_config(zero_optimization=zero, logging_steps=3, **rest)}
    run_ranks(train_tiny, 2, str(tmp_path / "out"), config)
    found = norms(tmp_path / "out")
    assert found.keys() == whole.keys()
    for name, values in whole.items():
        assert found[name] == pytest.approx(values, rel=2e-5, abs=2e-6), name  # sums in another order, over eight steps
