"""Blocks that are computed twice or compiled give the same steps, at every ZeRO stage that allows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mmfoundry.pipeline.blocks import wrap_blocks
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import init_runtime, rank_in, world_in
from mmfoundry.pipeline.engine import Engine
from mmfoundry.pipeline.engine_config import EngineConfig
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.optimizers import decay_groups
from tests.ranks import run_ranks

ROWS, WIDTH = 8, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2)
        self.calls = 0

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        if not torch.compiler.is_compiling():
            self.calls += 1
        return x + gain * self.dropout(torch.tanh(self.inner(x)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.layers = nn.Linear(5, WIDTH), nn.ModuleList(Block() for _ in range(3))
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        x = self.first(batch["x"])
        for layer in self.layers:
            x = layer(x, gain=0.5)
        return self.last(x)

    def repeated_blocks(self) -> list[nn.Module]:
        return list(self.layers)


def mean_square(output: Tensor, batch: dict[str, Any], group: ProcessGroup | None) -> dict[str, Tensor]:
    return {"loss": output.float().square().mean()}


def steps(group: ProcessGroup | None, changes: dict[str, Any]) -> tuple[list[Tensor], int]:
    """The weights after four steps, and how often a block ran."""
    model = Stack()
    config = parse(EngineConfig, {"train_batch_size": ROWS} | changes)
    groups = decay_groups(model.named_parameters(), 0.1)
    engine = Engine(
        config, model, mean_square, lambda groups: torch.optim.AdamW(groups, lr=0.02), groups, init_runtime()
    )
    torch.manual_seed(5 + rank_in(group))
    x = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(0))[rank_in(group) :: world_in(group)]
    for _ in range(4):
        engine.accumulate({"x": x})
        engine.step(1.0)
    engine.close()
    assert all("forward" not in vars(block) for block in model.layers)
    return [weight.detach().clone() for weight in model.parameters()], sum(block.calls for block in model.layers)


@pytest.mark.parametrize("cached", [None, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_blocks_computed_twice_change_nothing(stage: int, cached: int | None) -> None:
    plain = {"zero_optimization": {"stage": stage}, "grad_cache_chunk_size": cached}
    twice = plain | {"gradient_checkpointing": True}
    if stage == 0:
        pairs = [(steps(None, plain), steps(None, twice))]
    else:
        pairs = list(zip(run_ranks(steps, 2, plain), run_ranks(steps, 2, twice), strict=True))
    for (expected, calls), (found, more_calls) in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        passes = calls // 12 - (cached is not None) * (calls // 24)  # those with gradients
        assert more_calls == calls + 12 * passes


@pytest.mark.parametrize("stage", [0, 2])
def test_compiled_blocks_change_nothing(stage: int) -> None:
    plain = {"zero_optimization": {"stage": stage}}
    compiled = plain | {"torch_compile": True, "torch_compile_backend": "aot_eager", "gradient_checkpointing": True}
    if stage == 0:
        pairs = [(steps(None, plain), steps(None, compiled))]
    else:
        pairs = list(zip(run_ranks(steps, 2, plain), run_ranks(steps, 2, compiled), strict=True))
    for (expected, _), (found, calls) in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert calls == 0  # compiled, all of them


def test_a_compiler_that_torch_lacks_is_named_with_those_that_it_has() -> None:
    wrong = parse(EngineConfig, {"train_batch_size": 2, "torch_compile": True, "torch_compile_backend": "inducktor"})
    with pytest.raises(ConfigError, match=r"torch has no 'inducktor'; it has .*inductor"):
        wrap_blocks(wrong, Stack())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="torch_compile does not go with ZeRO stage 3"):
        parse(EngineConfig, {"train_batch_size": 2, "torch_compile": True, "zero_optimization": {"stage": 3}})
    model = nn.Linear(5, 1)
    config = EngineConfig(train_batch_size=ROWS, gradient_checkpointing=True)
    groups = decay_groups(model.named_parameters(), 0.1)
    with pytest.raises(ConfigError, match="gradient_checkpointing: Linear does not say which blocks it repeats"):
        Engine(config, model, mean_square, lambda groups: torch.optim.AdamW(groups, lr=0.02), groups, init_runtime())
