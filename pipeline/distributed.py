"""Processes that train together: who we are, and the few collectives that stages and objectives need.

`group` is the set of ranks that form the joint batch; `None` always means this process alone, so that code written
with a group runs unchanged on one process, without a launcher and without touching torch.distributed.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, ProcessGroup  # type: ignore[attr-defined]

# torch 2.13 gave these two new names; DeepSpeed calls them by the old ones at every step.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_RENAMED = r"`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"

# A rank that waits this long for another has lost it. Generous: rank 0 may index shards while the others wait.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Runtime:
    """This process's place among those that train together.

    Attributes:
        rank: 0-based, unique over all machines.
        world_size: processes in all.
        local_rank: 0-based, unique on this machine.
        device: where this rank's tensors live.
        group: the ranks of the joint batch; None on one process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0


def init_runtime() -> Runtime:
    """Join the other ranks and say who we are; a second call returns the same answer.

    Reads what `deepspeed`, `torchrun`, `accelerate launch` and our Slurm recipe set (`RANK`, `WORLD_SIZE`,
    `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT`); without them this process is alone and no port is opened. gloo on
    CPU, nccl on GPU.
    `DS_ACCELERATOR=cpu` keeps a machine with GPUs on its CPUs.

    Raises:
        RuntimeError: the launcher's variables are incomplete, or the other ranks do not come.
    """
    if os.environ.get("DS_ACCELERATOR") != "cpu" and not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed probes for accelerators that this torch cannot drive
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu") if on_cpu else torch.device("cuda", local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _init_process_group("gloo" if on_cpu else "nccl")
    _init_deepspeed(on_cpu)
    world_size = dist.get_world_size()
    return Runtime(dist.get_rank(), world_size, local_rank, device, dist.group.WORLD if world_size > 1 else None)


def _init_process_group(backend: str) -> None:
    if "WORLD_SIZE" not in os.environ:
        # DeepSpeed wants a process group even for one process; an in-memory store needs neither port nor variables,
        # which child processes would inherit and take for a launcher's.
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RuntimeError(f"WORLD_SIZE is set but {', '.join(missing)} not: start with deepspeed or torchrun")
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)


def _init_deepspeed(on_cpu: bool) -> None:
    # Imported here: it takes seconds.
    from deepspeed import comm, ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=_RENAMED)
    if comm.is_initialized():
        return
    if on_cpu:
        # On CPU, DeepSpeed would compile a shared-memory operator that only its inference reads, for a minute or more;
        # an empty table of operators that can be built says no, and spares the probing of all the others.
        ops.__compatible_ops__ = {}
    comm.init_distributed(auto_mpi_discovery=False, verbose=False)


def rank_in(group: ProcessGroup | None) -> int:
    """This process's rank in `group`; 0 when alone."""
    return 0 if group is None else dist.get_rank(group)


def world_in(group: ProcessGroup | None) -> int:
    """How many ranks `group` has; 1 when alone."""
    return 1 if group is None else dist.get_world_size(group)


def all_gather_into(gathered: Tensor, mine: Tensor, group: ProcessGroup) -> None:
    """Fill `gathered` (world * n, ...) with every rank's `mine` (n, ...), contiguous, in rank order; no gradient."""
    _all_gather(gathered, mine, group=group)


class _AllGatherRows(torch.autograd.Function):
    """Concatenate every rank's rows; the gradient of a row is the sum of what all ranks ask of it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        gathered = rows.new_empty((dist.get_world_size(group) * len(rows), *rows.shape[1:]))
        all_gather_into(gathered, rows.contiguous(), group)
        return gathered

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        group = ctx.group  # type: ignore[attr-defined]
        mine = grad.new_empty((len(grad) // dist.get_world_size(group), *grad.shape[1:]))
        _reduce_scatter(mine, grad.contiguous(), group=group)
        return mine, None


def all_gather_rows(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """Concatenate the rows of all ranks in rank order; differentiable.

    The gradient that reaches a row is the sum over ranks, so a loss whose mean over ranks is the joint loss gets, once
    DeepSpeed has averaged parameter gradients over ranks, the gradient of the joint loss.

    Args:
        rows: (b, ...), b and the other sizes equal on all ranks.
        group: the ranks that form the joint batch; None returns `rows` itself.
    Returns:
        (world * b, ...), the same dtype and device.
    """
    return rows if group is None else _AllGatherRows.apply(rows, group)


def all_reduce_sum(values: Mapping[str, float | int | Tensor], group: ProcessGroup | None) -> dict[str, float]:
    """Sum each named number over ranks in one collective, in float64.

    Args:
        values: the same names on every rank, in any order; 0-d tensors are read to the host.
        group: the ranks to sum over; None sums over this process alone.
    """
    names = sorted(values)
    if group is None:
        return {name: float(values[name]) for name in names}
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    total = torch.tensor([float(values[name]) for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return dict(zip(names, total.tolist(), strict=True))


def any_rank(flag: bool, group: ProcessGroup | None) -> bool:
    """Whether `flag` holds on at least one rank; the same answer on all of them."""
    return all_reduce_sum({"flag": flag}, group)["flag"] > 0


def barrier(group: ProcessGroup | None) -> None:
    """Wait until every rank of `group` is here."""
    if group is not None:
        dist.barrier(group=group)
