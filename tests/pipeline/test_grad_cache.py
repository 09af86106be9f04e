"""The gradient cache: the gradient of the whole batch, at every ZeRO stage, with dropout drawn once for both passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from mmfoundry.pipeline import grad_cache
from mmfoundry.pipeline.distributed import all_gather_rows, init_runtime, rank_in, world_in
from mmfoundry.pipeline.engine import Engine
from mmfoundry.pipeline.engine_config import EngineConfig
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.optimizers import decay_groups
from tests.pipeline.tiny_training import train_tiny, trainer_config
from tests.ranks import run_ranks

ROWS = 12


class Pair(NamedTuple):
    left: Tensor
    right: Tensor
    scale: Tensor
    bias: Tensor | None = None


class Towers(nn.Module):
    """Two towers and a temperature, with dropout, and a buffer that counts the rows seen."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.left, self.right = nn.Linear(5, 4), nn.Linear(5, 4)
        self.dropout = nn.Dropout(dropout)
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: dict[str, Any]) -> Pair:
        self.rows += len(batch["x"])
        left, right = (self.dropout(tower(batch[name])) for tower, name in ((self.left, "x"), (self.right, "y")))
        return Pair(F.normalize(left, dim=1), F.normalize(right, dim=1), self.log_scale.exp())


def contrast(output: Pair, batch: dict[str, Any], group: ProcessGroup | None) -> dict[str, Tensor]:
    target = rank_in(group) * len(output.left) + torch.arange(len(output.left))
    logits = output.scale * output.left @ all_gather_rows(output.right, group).T
    return {"loss": F.cross_entropy(logits, target), "rows": torch.tensor(float(len(target)))}


def batch(group: ProcessGroup | None = None, step: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    joint = {name: torch.randn(ROWS, 5, generator=generator) for name in "xy"}
    mine = {name: value[rank_in(group) :: world_in(group)] for name, value in joint.items()}
    return mine | {"__key__": [str(row) for row in range(len(mine["x"]))], "epoch": 3}


def five_steps(group: ProcessGroup | None, changes: dict[str, Any], dropout: float = 0.0) -> list[Any]:
    model = Towers(dropout)
    config = EngineConfig.model_validate({"train_batch_size": ROWS, "gradient_clipping": 0.1} | changes)
    groups = decay_groups(model.named_parameters(), 0.1)
    engine = Engine(config, model, contrast, lambda groups: torch.optim.AdamW(groups, lr=0.01), groups, init_runtime())
    if config.precision == "fp16":
        engine.restore_loss_scale(1024.0, 0)
    torch.manual_seed(rank_in(group))
    losses = []
    for step in range(5):
        losses.append(engine.accumulate(batch(group, step))["loss"].item())
        engine.step(1.0)
    drawn = torch.rand(())
    engine.close()
    return [torch.tensor(losses), *(p.detach().clone() for p in model.parameters()), model.rows.clone(), drawn]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_gradient_is_torchs_own(dropout: float) -> None:
    """One backward pass through all chunks' outputs together, drawn in the same order."""
    model, whole = Towers(dropout).double(), {k: v.double() for k, v in batch().items() if k in "xy"}
    chunks = grad_cache.split_rows(whole, ROWS, 3)
    torch.manual_seed(7)
    outputs = [model(chunk) for chunk in chunks]
    left, right = (torch.cat([getattr(each, side) for each in outputs]) for side in ("left", "right"))
    output = Pair(left, right, model.log_scale.exp())
    loss = contrast(output, whole, None)["loss"]
    expected = torch.autograd.grad(loss, list(model.parameters()))
    drawn, rows = torch.rand(()), int(model.rows)
    torch.manual_seed(7)
    values = grad_cache.accumulate(
        chunks,
        model,
        lambda output: contrast(output, whole, None),
        lambda chunk, grads: grad_cache.inner_product(model(chunk), grads).backward(),
        buffers=model.buffers(),
    )
    assert values["loss"].item() == pytest.approx(loss.item(), rel=1e-12)
    assert values["rows"] == ROWS
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected), rtol=1e-10, atol=1e-12)
    assert (torch.rand(()), int(model.rows)) == (drawn, 2 * rows)  # goes on as after one pass


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_any_chunks_give_the_joint_steps(world: int, stage: int) -> None:
    *expected, _, _ = five_steps(None, {})
    changes = {"zero_optimization": {"stage": stage}, "grad_cache_chunk_size": 2}
    runs = run_ranks(five_steps, world, changes) if world > 1 else [five_steps(None, changes)]
    joint = torch.stack([run[0] for run in runs]).mean(0)
    torch.testing.assert_close(joint, expected[0], rtol=1e-5, atol=1e-6)
    for *found, rows, _ in runs:
        _, *weights = found
        torch.testing.assert_close(weights, expected[1:], rtol=1e-4, atol=1e-6)  # rounding, over five steps of AdamW
        assert rows == 5 * ROWS // world


def test_chunks_of_micro_batches_are_like_micro_batches() -> None:
    whole = five_steps(None, {"precision": "bf16"})
    chunked = five_steps(None, {"precision": "bf16", "grad_cache_chunk_size": 3})
    torch.testing.assert_close(chunked[1:-2], whole[1:-2], rtol=0.01, atol=1e-3)  # bf16 keeps 8 bits
    scaled = five_steps(None, {"precision": "fp16", "grad_cache_chunk_size": 4})
    torch.testing.assert_close(scaled[1:-2], whole[1:-2], rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_trainer_counts_weights_with_it(stage: int, tmp_path: Path) -> None:
    """Losses a token, in micro-batches that are cut into chunks: the joint run all the same."""
    joint = train_tiny(None, str(tmp_path / "joint"), {"trainer": trainer_config()})
    assert not isinstance(joint, int | str)
    config = trainer_config(
        train_micro_batch_size_per_gpu=3, grad_cache_chunk_size=1, zero_optimization={"stage": stage}
    )
    for run in run_ranks(train_tiny, 2, str(tmp_path / "out"), {"trainer": config}):
        torch.testing.assert_close(run[0], joint[0], rtol=1e-5, atol=1e-5)
        for name in joint[1].keys() - {"calls"}:
            torch.testing.assert_close(run[1][name], joint[1][name], rtol=1e-5, atol=2e-6)


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="the batch has 4 rows, but its tiles has 9"):
        grad_cache.split_rows({"x": torch.ones(4), "tiles": torch.ones(9, 2)}, 4, 2)
    config = EngineConfig(train_batch_size=12, grad_cache_chunk_size=5)
    with pytest.raises(ConfigError, match="grad_cache_chunk_size 5 does not divide the 6 samples of a rank's loss"):
        config.chunks(2)
    assert EngineConfig(train_batch_size=12, grad_cache_chunk_size=50).chunks(2) == 1
    with pytest.raises(TypeError, match="cannot join outputs of type object"):
        list(grad_cache.tensors([object()]))
    with pytest.raises(ValueError, match="chunks of a batch differ in a plain output: 1 and others"):
        grad_cache.joined([{"count": 1}, {"count": 2}])
    with pytest.raises(ValueError, match="no output of the model depends on a trainable weight"):
        grad_cache.inner_product(torch.ones(2), [torch.ones(2)])
