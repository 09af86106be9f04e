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
from mmfoundry.pipeline.distributed import Runtime, init_runtime
from mmfoundry.pipeline.engine import Engine, EngineConfig, deepspeed_config
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.optimizers import OPTIMIZERS, OptimizerConfig, decay_groups
from tests.ranks import run_ranks

ROWS = 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(5, 16)
        self.second = nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.second(torch.tanh(self.first(batch["x"]))) * self.scale


def mean_square(output: Tensor, batch: dict[str, Any], group: ProcessGroup | None) -> dict[str, Tensor]:
    return {"loss": (output.float() - batch["y"]).square().mean()}


def root_at_zero(output: Tensor, batch: dict[str, Any], group: ProcessGroup | None) -> dict[str, Tensor]:
    """A loss that is finite where its gradient is not."""
    return {"loss": (output.float() * 0).square().sum().sqrt()}


def make_engine(
    model: nn.Module, objective: Any = mean_square, runtime: Runtime | None = None, **changes: Any
) -> Engine:
    config = parse(EngineConfig, {"train_batch_size": ROWS, "gradient_clipping": 0.1} | changes)
    optimizer = OptimizerConfig(lr=0.01)
    groups = decay_groups(model.named_parameters(), 0.1)
    return Engine(
        config,
        model,
        objective,
        lambda groups: OPTIMIZERS["adamw"](groups, optimizer),
        groups,
        runtime or init_runtime(),
    )


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(ROWS, 5, generator=generator), "y": torch.randn(ROWS, 3, generator=generator)}


def steps(engine: Engine, count: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    found = []
    for _ in range(count):
        loss = engine.forward(batch())["loss"]
        engine.backward(loss)
        found.append((loss.item(), engine.step(1.0)))
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_is_torchs_own(stage: int) -> None:
    """Against plain torch: clip the joint norm, then AdamW with the same groups."""
    expected, found = Net(), Net()
    optimizer = torch.optim.AdamW(decay_groups(expected.named_parameters(), 0.1), lr=0.01, betas=(0.9, 0.98), eps=1e-6)
    norms = []
    for _ in range(5):
        optimizer.zero_grad()
        mean_square(expected(batch()), batch(), None)["loss"].backward()
        norms.append(nn.utils.clip_grad_norm_(expected.parameters(), 0.1).item())
        optimizer.step()
    engine = make_engine(found, zero_optimization={"stage": stage})
    torch.testing.assert_close([norm for _, norm in steps(engine, 5)], norms, rtol=1e-5, atol=0)
    engine.close()
    for mine, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)  # rounding only


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_low_precision_follows_fp32(stage: int, precision: str) -> None:
    exact = make_engine(Net())
    reference = steps(exact, 5)
    exact.close()
    model = Net()
    engine = make_engine(model, precision=precision, zero_optimization={"stage": stage})
    found = steps(engine, 5)
    engine.close()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    torch.testing.assert_close(found, reference, rtol=0.05, atol=0.0)  # bf16 keeps 8 bits
    assert found != reference


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_fp16_lowers_its_loss_scale_until_gradients_are_finite(stage: int) -> None:
    model = Net()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    engine = make_engine(model, precision="fp16", zero_optimization={"stage": stage})
    engine.restore_loss_scale(2.0**30, 0)
    norms = []
    while not norms or not math.isfinite(norms[-1]):
        norms.append(steps(engine, 1)[0][1])
        assert engine.loss_scale >= 1
    assert len(norms) > 1
    assert engine.loss_scale == 2.0 ** (31 - len(norms))
    exact = make_engine(Net())
    assert norms[-1] == pytest.approx(steps(exact, 1)[0][1], rel=0.05)  # so none of the others changed a weight
    exact.close()
    engine.close()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_updates_nothing(stage: int) -> None:
    model = Net()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    engine = make_engine(model, root_at_zero, zero_optimization={"stage": stage})
    ((loss, norm),) = steps(engine, 1)
    assert loss == 0.0
    assert not math.isfinite(norm)
    engine.close()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def two_phases(group: ProcessGroup | None, stage: int) -> tuple[list[float], list[Tensor], list[str]]:
    """Train one part of a model, then another, as instruction tuning does."""
    model = Net()
    runtime = init_runtime()
    losses = []
    for trained in ("first", "second"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        engine = make_engine(
            model, runtime=runtime, zero_optimization={"stage": stage}, train_batch_size=ROWS * runtime.world_size
        )
        losses += [loss for loss, _ in steps(engine, 3)]
        underneath = weakref.ref(engine.deepspeed)
        engine.close()
        del engine
        gc.collect()
        assert underneath() is None  # its buffers are as large as the model
        losses.append(mean_square(model(batch()), batch(), None)["loss"].item())  # the model is whole and plain again
    left_over = [name for parameter in model.parameters() for name in vars(parameter)]
    return losses, [parameter.detach() for parameter in model.parameters()], left_over


@pytest.mark.parametrize("world", [1, 2])
def test_a_model_outlives_its_engines(world: int) -> None:
    expected, weights, _ = two_phases(None, 0)
    assert expected[0] > expected[3] > expected[-1]
    for stage in (1, 2, 3):
        runs = [two_phases(None, stage)] if world == 1 else run_ranks(two_phases, world, stage)
        for losses, found, left_over in runs:
            assert left_over == []
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-6)
    assert "LOCAL_RANK" not in os.environ  # accelerate would take it for a launcher's


def test_every_default_that_moved_is_written_out() -> None:
    config = EngineConfig(train_batch_size=64, train_micro_batch_size_per_gpu=8)
    settings = deepspeed_config(config, world_size=2, numel=1000, on_gpu=False)
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["gradient_clipping"] == 0.0  # DeepSpeed's own default became 1.0; at stage 0 we clip
    sharded = EngineConfig(train_batch_size=64, zero_optimization={"stage": 2})  # type: ignore[arg-type]
    assert deepspeed_config(sharded, 2, 1000, False)["gradient_clipping"] == 1.0


@pytest.mark.parametrize(("batch_size", "micro", "world"), [(10, None, 3), (12, 5, 2), (12, 4, 2)])
def test_a_batch_that_does_not_divide_is_refused(batch_size: int, micro: int | None, world: int) -> None:
    config = EngineConfig(train_batch_size=batch_size, train_micro_batch_size_per_gpu=micro)
    with pytest.raises(ConfigError, match=rf"train_batch_size {batch_size} does not divide into {world} rank"):
        config.micro_batches(world)
    assert EngineConfig(train_batch_size=12, train_micro_batch_size_per_gpu=3).micro_batches(2) == (3, 2)
    assert EngineConfig(train_batch_size=12, train_micro_batch_size_per_gpu=3).samples_per_fetch(2) == 6
