import os

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmfoundry.pipeline.distributed import (
    _init_process_group,
    all_gather_rows,
    all_reduce_sum,
    any_rank,
    barrier,
    init_runtime,
    rank_in,
    world_in,
)
from tests.ranks import run_ranks


def test_alone_without_a_launcher() -> None:
    runtime = init_runtime()
    assert (runtime.rank, runtime.world_size, runtime.group, runtime.is_main) == (0, 1, None, True)
    assert runtime == init_runtime()
    assert (rank_in(None), world_in(None)) == (0, 1)
    barrier(None)
    assert "WORLD_SIZE" not in os.environ  # child processes would take it for a launcher's


def test_incomplete_launcher_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(RuntimeError, match="MASTER_ADDR, MASTER_PORT not"):
        _init_process_group("gloo")


def gathered(group: ProcessGroup | None, world: int) -> tuple[Tensor, Tensor]:
    """Each rank weighs all rows by its own factor: the gradient of a row must be the sum of those factors."""
    rank = rank_in(group)
    joint = torch.arange(world * 6, dtype=torch.float64).reshape(world * 2, 3)
    rows = joint[rank * 2 : rank * 2 + 2].t().contiguous().t().requires_grad_()  # not contiguous
    together = all_gather_rows(rows, group)
    (together * (rank + 1)).sum().backward()
    assert rows.grad is not None
    return together.detach(), rows.grad


@pytest.mark.parametrize("world", [2, 3])
def test_gather_keeps_rank_order_and_sums_gradients(world: int) -> None:
    for together, grad in run_ranks(gathered, world, world):
        assert torch.equal(together, torch.arange(world * 6, dtype=torch.float64).reshape(world * 2, 3))
        assert torch.equal(grad, torch.full((2, 3), sum(range(1, world + 1)), dtype=torch.float64))


def test_gather_alone_is_the_rows_themselves() -> None:
    rows = torch.ones(2, 3)
    assert all_gather_rows(rows, None) is rows


def sums(group: ProcessGroup | None) -> tuple[dict[str, float], bool, bool]:
    rank = rank_in(group)
    values: dict[str, float | Tensor] = {"count": 2**53 - 1 if rank == 0 else 1, "loss": torch.tensor(0.5)}
    if rank:
        values = dict(reversed(values.items()))  # names, not positions, are summed
    return all_reduce_sum(values, group), any_rank(rank == 1, group), any_rank(False, group)


def test_sums_by_name_in_double_precision() -> None:
    assert sums(None) == ({"count": 2.0**53 - 1, "loss": 0.5}, False, False)
    for found in run_ranks(sums, 2):
        assert found == ({"count": 2.0**53, "loss": 1.0}, True, False)


def fail_on_one(group: ProcessGroup | None) -> int:
    if rank_in(group) == 1:
        raise ValueError("only here")
    return 0


def test_the_helper_reports_a_rank_that_fails() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 raised[\s\S]*only here"):
        run_ranks(fail_on_one, 2)
    assert len(run_ranks(sums, 2)) == 2
