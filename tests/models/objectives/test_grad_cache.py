"""Every objective through a gradient cache, on one process and many, against one pass over the joint batch."""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmfoundry.models.objectives import objective_with
from mmfoundry.pipeline import grad_cache
from mmfoundry.pipeline.distributed import rank_in
from tests.models.objectives.test_ranks import CASES, EXACT, TOLERANCE, TinyModel, joint_batch, values_and_grads
from tests.ranks import run_ranks

ROWS, CHUNK = 12, 3


def cached(group: ProcessGroup | None, cases: list[tuple[str, dict[str, Any]]], world: int) -> list[list[Tensor]]:
    """For each objective this rank's loss, then its gradient for each weight."""
    found = []
    for name, options in cases:
        torch.manual_seed(0)
        model, objective = TinyModel().double(), objective_with(name, options)
        batch = {key: value[rank_in(group) :: world] for key, value in joint_batch(rows=ROWS).items()}
        values = grad_cache.accumulate(
            grad_cache.split_rows(batch, ROWS // world, CHUNK),
            partial(outputs, model),
            partial(scored, objective, batch, group),
            partial(backward, model),
        )
        zero = (torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in model.parameters())
        found.append([values["loss"], *zero])
    return found


def outputs(model: TinyModel, chunk: dict[str, Tensor]) -> dict[str, Any]:
    return vars(model(chunk))


def scored(objective: Any, batch: Any, group: ProcessGroup | None, output: dict[str, Any]) -> dict[str, Tensor]:
    return objective(SimpleNamespace(**output), batch, group)


def backward(model: TinyModel, chunk: dict[str, Tensor], grads: Sequence[Tensor | None]) -> None:
    grad_cache.inner_product(outputs(model, chunk), grads).backward()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_gradient_of_the_joint_batch(world: int) -> None:
    per_rank = run_ranks(cached, world, CASES, world) if world > 1 else [cached(None, CASES, 1)]
    for case, (name, options) in enumerate(CASES):
        values, gradients = values_and_grads(None, name, 1, options)
        rtol, atol = TOLERANCE.get(name, EXACT)
        found = [torch.stack(own).mean(0) for own in zip(*(each[case] for each in per_rank), strict=True)]
        for part, expected in zip(found, [values["loss"], *gradients], strict=True):
            torch.testing.assert_close(part, expected, rtol=rtol, atol=atol, msg=f"{name}: {part} is not {expected}")
