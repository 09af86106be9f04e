"""One phase under DeepSpeed: precision, gradients that are not finite, and models that outlive their engine."""

from __future__ import annotations

import gc
import math
import os
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import all_reduce_sum, init_runtime, rank_in, world_in
from mmfoundry.pipeline.engine import Engine
from mmfoundry.pipeline.engine_config import EngineConfig, deepspeed_config
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.optimizers import OPTIMIZERS, OptimizerConfig, decay_groups
from tests.ranks import run_ranks

ROWS = 8
Steps = list[tuple[float, float]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(5, 16)
        self.second = nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))  # 0-d, which DeepSpeed 0.19.8 cannot send

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.second(torch.tanh(self.first(batch["x"]))) * self.scale


def mean_square(output: Tensor, batch: dict[str, Any], group: ProcessGroup | None) -> dict[str, Tensor]:
    return {"loss": (output.float() - batch["y"]).square().mean()}


def root_at_zero(output: Tensor, batch: dict[str, Any], group: ProcessGroup | None) -> dict[str, Tensor]:
    """A loss that is finite where its gradient is not."""
    return {"loss": (output.float() * 0).square().sum().sqrt()}


def make_engine(
    model: nn.Module, objective: Any = mean_square, optimizer_type: str = "adamw", **changes: Any
) -> Engine:
    config = parse(EngineConfig, {"train_batch_size": ROWS, "gradient_clipping": 0.1} | changes)
    optimizer = OptimizerConfig(lr=0.01, type=optimizer_type)
    groups = decay_groups(model.named_parameters(), 0.1)
    runtime = init_runtime()
    return Engine(
        config, model, objective, lambda groups: OPTIMIZERS[optimizer_type](groups, optimizer), groups, runtime
    )


def batch(group: ProcessGroup | None = None) -> dict[str, Tensor]:
    """This rank's rows of the joint batch."""
    generator = torch.Generator().manual_seed(0)
    joint = {"x": torch.randn(ROWS, 5, generator=generator), "y": torch.randn(ROWS, 3, generator=generator)}
    return {name: value[rank_in(group) :: world_in(group)] for name, value in joint.items()}


def steps(engine: Engine, count: int, group: ProcessGroup | None = None) -> Steps:
    """Joint loss and gradient norm of each step."""
    found = []
    for _ in range(count):
        loss = engine.forward(batch(group))["loss"]
        engine.backward(loss)
        joint = all_reduce_sum({"loss": loss.detach()}, group)["loss"] / world_in(group)
        found.append((joint, float(engine.step(1.0))))
    return found


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def five_steps(group: ProcessGroup | None, changes: dict[str, Any]) -> tuple[Steps, list[Tensor]]:
    model = Net()
    engine = make_engine(model, **changes)
    if changes.get("precision") == "fp16":
        engine.restore_loss_scale(1024.0, 0)  # so low that no step is skipped
    found = steps(engine, 5, group)
    engine.close()
    return found, weights(model)


def on_ranks(function: Any, stage: int, *args: Any) -> list[Any]:
    """Stage 0 here, the others on two ranks: one process has nothing to share out."""
    return [function(None, *args)] if stage == 0 else run_ranks(function, 2, *args)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_is_torchs_own(stage: int) -> None:
    """Against plain torch: clip the joint norm, then AdamW with the same groups."""
    model = Net()
    optimizer = torch.optim.AdamW(decay_groups(model.named_parameters(), 0.1), lr=0.01, betas=(0.9, 0.98), eps=1e-6)
    expected = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = mean_square(model(batch()), batch(), None)["loss"]
        loss.backward()
        expected.append((loss.item(), nn.utils.clip_grad_norm_(model.parameters(), 0.1).item()))
        optimizer.step()
    for found, values in on_ranks(five_steps, stage, {"zero_optimization": {"stage": stage}}):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)  # rounding only
        torch.testing.assert_close(values, weights(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_low_precision_follows_fp32(stage: int, precision: str) -> None:
    reference, _ = five_steps(None, {})
    for found, values in on_ranks(five_steps, stage, {"precision": precision, "zero_optimization": {"stage": stage}}):
        assert all(value.dtype == torch.float32 for value in values)
        torch.testing.assert_close(found, reference, rtol=0.05, atol=0.0)  # bf16 keeps 8 bits
        assert found != reference


def lower_the_scale(group: ProcessGroup | None, stage: int) -> tuple[list[float], float, bool]:
    model = Net()
    before = weights(model)
    engine = make_engine(model, precision="fp16", zero_optimization={"stage": stage})
    engine.restore_loss_scale(2.0**30, 0)
    norms: list[float] = []
    while not norms or not math.isfinite(norms[-1]):
        norms.append(steps(engine, 1, group)[0][1])
        assert engine.loss_scale >= 1
    engine.close()
    return norms, engine.loss_scale, any(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_fp16_lowers_its_loss_scale_until_gradients_are_finite(stage: int) -> None:
    reference, _ = five_steps(None, {})
    for norms, scale, untouched in on_ranks(lower_the_scale, stage, stage):
        assert len(norms) > 1
        assert scale == 2.0 ** (31 - len(norms))
        assert norms[-1] == pytest.approx(reference[0][1], rel=0.05)  # so no skipped step changed a weight
        assert not untouched


def step_on_infinity(group: ProcessGroup | None, stage: int) -> tuple[Steps, bool]:
    model = Net()
    before = weights(model)
    engine = make_engine(model, root_at_zero, zero_optimization={"stage": stage})
    found = steps(engine, 1, group)
    engine.close()
    return found, all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_updates_nothing(stage: int) -> None:
    for ((loss, norm),), untouched in on_ranks(step_on_infinity, stage, stage):
        assert loss == 0.0
        assert not math.isfinite(norm)
        assert untouched


def two_phases(group: ProcessGroup | None, stage: int) -> tuple[list[float], list[Tensor], list[str]]:
    """Train one part of a model, then another, as instruction tuning does."""
    model = Net()
    losses = []
    for trained in (model.first, model.second):
        model.requires_grad_(False)
        trained.requires_grad_(True)
        engine = make_engine(model, zero_optimization={"stage": stage})
        losses += [loss for loss, _ in steps(engine, 3, group)]
        underneath = weakref.ref(engine.deepspeed)
        engine.close()
        del engine
        gc.collect()
        assert underneath() is None  # its buffers are as large as the model
        losses.append(mean_square(model(batch()), batch(), None)["loss"].item())  # the model is whole and plain again
    return losses, weights(model), [name for parameter in model.parameters() for name in vars(parameter)]


def test_a_model_outlives_its_engines() -> None:
    expected, values, _ = two_phases(None, 0)
    assert expected[0] > expected[3] > expected[-1]
    for stage in (1, 2, 3):
        for losses, found, left_over in run_ranks(two_phases, 2, stage):
            assert left_over == []
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-6)
    assert "LOCAL_RANK" not in os.environ  # accelerate would take it for a launcher's


def test_every_default_that_moved_is_written_out() -> None:
    config = EngineConfig(train_batch_size=64, train_micro_batch_size_per_gpu=8)
    settings = deepspeed_config(config, world_size=2, numel=1000, on_gpu=False)
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["gradient_clipping"] == 0.0  # DeepSpeed's own default became 1.0; at stage 0 we clip
    sharded = parse(EngineConfig, {"train_batch_size": 64, "zero_optimization": {"stage": 2}})
    assert deepspeed_config(sharded, 2, 1000, False)["gradient_clipping"] == 1.0
    assert deepspeed_config(sharded, 1, 1000, False)["zero_optimization"]["stage"] == 0


@pytest.mark.parametrize(("batch_size", "micro", "world"), [(10, None, 3), (12, 5, 2), (12, 4, 2)])
def test_a_batch_that_does_not_divide_is_refused(batch_size: int, micro: int | None, world: int) -> None:
    config = EngineConfig(train_batch_size=batch_size, train_micro_batch_size_per_gpu=micro)
    with pytest.raises(ConfigError, match=rf"train_batch_size {batch_size} does not divide into {world} rank"):
        config.micro_batches(world)
    assert EngineConfig(train_batch_size=12, train_micro_batch_size_per_gpu=3).micro_batches(2) == (3, 2)
    assert EngineConfig(train_batch_size=12, train_micro_batch_size_per_gpu=3).samples_per_fetch(2) == 6
