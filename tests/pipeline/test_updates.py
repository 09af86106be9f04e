"""The host does not wait for the device in each step, and what it decides later is decided as if it had waited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tests.pipeline import tiny_training
from tests.pipeline.tiny_training import TokenLoss, train_tiny, trainer_config
from tests.ranks import run_ranks
from tests.waits import Waits

READ = "metrics.py:numbers tolist"


def events(group: ProcessGroup | None, output: str, config: dict[str, Any]) -> list[str]:
    """What had the host wait, in order, with `forward` where a step's loss was queued; from the first step on."""
    waits, score, loader = Waits(), TokenLoss.__call__, tiny_training.TinyLoader

    def scored(*args: Any) -> dict[str, Tensor]:
        waits.found.append("forward")
        return score(*args)

    TokenLoss.__call__ = scored  # type: ignore[method-assign]
    try:
        with waits:
            train_tiny(group, output, config)
    finally:
        TokenLoss.__call__ = score  # type: ignore[method-assign]
        tiny_training.TinyLoader = loader  # type: ignore[misc]
    found = waits.found
    return found[found.index("forward") : len(found) - found[::-1].index(READ)]


def config(**changes: Any) -> dict[str, Any]:
    return {"trainer": trainer_config(max_steps=7, logging_steps=4, save_steps=0, **changes)}


def test_each_step_is_read_while_the_next_one_is_computed(tmp_path: Path) -> None:
    found = events(None, str(tmp_path / "out"), config())
    norms = "gauges.py:read tolist"
    to_first_point = ["forward", "forward", READ, "forward", READ, "forward", READ, READ, norms]
    assert found[: len(to_first_point)] == to_first_point
    assert found[len(to_first_point) :] == ["forward", "forward", READ, "forward", READ, READ]


def test_micro_batches_and_the_gradient_cache_do_not_wait_either(tmp_path: Path) -> None:
    for number, changes in enumerate(({"train_micro_batch_size_per_gpu": 3}, {"precision": "bf16"})):
        found = events(None, str(tmp_path / str(number)), config(**changes))
        assert set(found) == {"forward", READ, "gauges.py:read tolist"}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_on_ranks_only_deepspeed_waits_for_more(stage: int, tmp_path: Path) -> None:
    for rank, found in enumerate(
        run_ranks(events, 2, str(tmp_path / "out"), config(zero_optimization={"stage": stage}))
    ):
        ours = [each for each in found if not each.startswith("deepspeed/")]
        steps = [each for each in ours if each in ("forward", READ)]
        assert steps == ["forward", *["forward", READ] * 3, READ, "forward", *["forward", READ] * 2, READ]
        assert set(ours) - {"forward", READ} == ({"gauges.py:read tolist"} if rank == 0 or stage else set())
        assert (len(found) == len(ours)) == (stage == 0)


def test_who_asks_for_more_than_to_stop_waits(tmp_path: Path) -> None:
    for number, guard in enumerate(({"non_finite": "skip"}, {"spike": "stop"})):
        found = events(None, str(tmp_path / str(number)), config(guard=guard))
        steps = [each for each in found if each in ("forward", READ)]
        assert steps == ["forward", READ] * 7


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "bad", [12 * 4 + 1, 12 * 3]
)  # of step 5, which is read a step late, and of step 4, which is not
def test_what_is_not_finite_stops_all_ranks_at_its_step(bad: int, stage: int, tmp_path: Path) -> None:
    step = 1 + bad // 12
    settings = trainer_config(logging_steps=4, save_steps=1, zero_optimization={"stage": stage})
    settings["save_steps"] = 3
    for error in run_ranks(train_tiny, 2, str(tmp_path / "out"), {"trainer": settings, "bad": bad}):
        assert f"train step {step}: the loss is nan on rank(s) {bad % 2} with the samples" in error
        assert f"row-{bad}" in error
    work = tmp_path / "out.work"
    assert len((work / "metrics.jsonl").read_text().splitlines()) == step - 1
    assert [path.name for path in (work / "checkpoints" / "train").iterdir()] == ["step-000003"]
    assert json.loads((work / f"non_finite-train-{step:06d}.json").read_text())["step"] == step


def weights_after_bad_steps(group: ProcessGroup | None, stage: int, optimizer: str) -> tuple[bool, bool, list[float]]:
    """Whether a step that is not valid, and one whose gradient is not finite, left the weights; and the norms."""
    from tests.pipeline.test_engine import Net, batch, make_engine

    model = Net()
    engine = make_engine(model, zero_optimization={"stage": stage}, optimizer_type=optimizer)
    whole = torch.ones((), dtype=torch.bool)
    kept, norms = [], []
    for factor, valid in ((1.0, whole), (1.0, ~whole), (torch.nan, whole), (1.0, whole)):
        before = [value.clone() for value in _whole(engine, model)]
        engine.backward(engine.forward(batch(group))["loss"] * factor)
        norms.append(float(engine.step(1.0, valid)))
        kept.append(all(torch.equal(a, b) for a, b in zip(before, _whole(engine, model), strict=True)))
    engine.close()
    assert not kept[0]
    assert not kept[3]
    return kept[1], kept[2], norms


def _whole(engine: Any, model: torch.nn.Module) -> list[Tensor]:
    from mmfoundry.pipeline.optimizer_state import full_parameter

    return [full_parameter(engine, parameter).detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize(("stage", "optimizer"), [(0, "adamw"), (0, "lion"), (1, "adamw"), (2, "adamw"), (3, "adamw")])
def test_a_step_that_is_not_valid_leaves_the_weights(stage: int, optimizer: str) -> None:
    for kept_invalid, kept_nan, norms in run_ranks(weights_after_bad_steps, 2, stage, optimizer):
        assert kept_invalid
        assert kept_nan
        assert not torch.isfinite(torch.tensor(norms[2]))
        assert norms[3] > 0
