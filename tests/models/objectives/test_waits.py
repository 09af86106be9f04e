"""No objective, and no tower on a GPU, has the host wait for the device."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfoundry.models.objectives import objective_with
from mmfoundry.models.teachers import Taught
from tests.models.objectives.test_ranks import CASES, TinyModel, joint_batch
from tests.models.tiny import pairs, tiny_clip, tiny_config
from tests.waits import Waits


def scored(name: str, options: dict[str, Any], output: Any, batch: dict[str, Tensor]) -> list[str]:
    """What waited in an objective and in the backward pass through it."""
    with Waits() as waits:
        objective_with(name, options)(output, batch)["loss"].backward()
    return waits.found


@pytest.mark.parametrize(("name", "options"), CASES)
def test_an_objective_reads_no_number(name: str, options: dict[str, Any]) -> None:
    batch = joint_batch(rows=6)
    output = TinyModel().double()(batch)
    assert scored(name, options, output, batch) == []


def test_nor_does_one_with_teachers() -> None:
    batch = joint_batch(rows=6)
    output = TinyModel().double()(batch)
    with Waits() as waits:
        Taught(objective_with("distillation", {}), {}, {"a": 20.0})(output, batch)["loss"].backward()
    assert waits.found == []


def test_nor_do_the_towers() -> None:
    """On the meta device there are no numbers that could be read."""
    vision = tiny_config().vision_cfg.model_dump() | {"patch_dropout": 0.5}
    model = tiny_clip(init_logit_bias=-3.0, vision_cfg=vision).to("meta")
    with Waits() as waits:
        output = model({key: value.to("meta") for key, value in pairs(6).items()})
        (output.scale * (output.image_bD * output.text_bD).sum() + output.bias).backward()
    assert waits.found == []
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_number_that_is_read_is_found() -> None:
    with Waits() as waits:
        statistics.fmean(torch.ones(1))
    assert waits.found == ["statistics.py:fmean __float__", "statistics.py:fmean aten._local_scalar_dense.default"]
