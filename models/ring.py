"""Ranks in a ring: each hands its tensors to the next and takes those of the one before.

What a loss over all pairs needs of the other ranks passes by block by block, so that no rank ever holds the joint
batch: memory does not grow with the number of ranks (Inf-CL, Cheng et al. 2024, arXiv 2410.17243).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mmfoundry.pipeline.distributed import rank_in, world_in

# sides of a tile of logits: on a CPU by benchmarks/loss_memory.py; on a GPU a guess that nobody has measured yet
TILE_ROWS = {"cpu": 1024, "cuda": 4096}


class Ring:
    """A group's ranks, each with the next one as neighbour.

    Attributes:
        world: how many ranks there are; after as many hops a tensor is home again.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self.world = world_in(group)
        self._group = group
        if group is not None:
            rank = rank_in(group)
            self._next = dist.get_global_rank(group, (rank + 1) % self.world)
            self._previous = dist.get_global_rank(group, (rank - 1) % self.world)

    def pass_on(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to send to the next rank and to receive from the previous one, while this rank goes on computing.

        Args:
            tensor: of the same shape and dtype on all ranks; not written to before the result was asked for.

        Returns:
            Waits, and gives what the previous rank sent.
        """
        if self._group is None:
            return lambda: tensor
        incoming = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        operations = [  # held by `wait`: what is sent must stay until it is away
            dist.P2POp(dist.isend, tensor.contiguous(), self._next, self._group),
            dist.P2POp(dist.irecv, incoming, self._previous, self._group),
        ]
        under_way = dist.batch_isend_irecv(operations)

        def wait() -> Tensor:
            for each in under_way:
                each.wait()
            return operations[1].tensor

        return wait

    def blocks(self, mine: Tensor) -> Iterator[Tensor]:
        """Every rank's `mine`, one after the other, this rank's own first; the next one travels meanwhile."""
        block = mine
        for hop in range(self.world):
            incoming = self.pass_on(block) if hop + 1 < self.world else None
            yield block
            if incoming is not None:
                block = incoming()


def spans(rows: int, tile: int) -> list[slice]:
    """Cut `rows` into pieces of at most `tile`."""
    return [slice(start, min(start + tile, rows)) for start in range(0, rows, tile)]


def tile_rows(tile: int | None, device: torch.device) -> int:
    """The side of a tile: as asked for, or what is quick on this device."""
    return tile or TILE_ROWS.get(device.type, 1024)
