"""Where the ranks' flat partitions hold each tensor, and tensors made whole on one rank each, shared out among all.

ZeRO lays the parameters of a group end to end and cuts them into one partition a rank: stages 1 and 2 the group as a
whole, stage 3 each parameter by itself. Either way, in the order of the ranks, their slices of a tensor follow each
other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

# Numbers of this rank that travel at a time, unless a single tensor has more.
LARGEST_EXCHANGE = 2**24


@dataclass(frozen=True)
class Slice:
    """What a rank holds of a tensor: `numel` numbers at `offset` of its partition."""

    offset: int
    numel: int

    def of(self, flat: Tensor) -> Tensor:
        """A view into a partition, or into a state that is laid out alike."""
        return flat.detach().narrow(0, self.offset, self.numel)


@dataclass(frozen=True, eq=False)
class Cut:
    """A parameter, whole shape, and its slices, one a rank; some may be empty."""

    parameter: nn.Parameter
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]

    @property
    def numel(self) -> int:
        """Numbers of the whole tensor."""
        return math.prod(self.shape)

    def start(self, rank: int) -> int:
        """Which of the tensor's numbers a rank's slice begins with."""
        return sum(each.numel for each in self.slices[:rank])


@dataclass(frozen=True, eq=False)
class Partition:
    """The weights that this rank updates of one group of parameters.

    Attributes:
        flat: them, (n,) fp32; as long on every rank.
        cuts: the group's parameters; alike on every rank.
        param_group: index among the optimizer's.
        group: the ranks that share the group out.
        rank: this one among them.
    """

    flat: Tensor
    cuts: tuple[Cut, ...]
    param_group: int
    group: ProcessGroup
    rank: int

    def mine(self, cut: Cut, flat: Tensor) -> Tensor:
        """This rank's slice of a tensor in a partition, or in a state that is laid out alike."""
        return cut.slices[self.rank].of(flat)


def partitions_of(zero_optimizer: Any, stage: int) -> list[Partition]:
    """The partitions of DeepSpeed's optimizer of stage 1, 2 or 3; at stage 3 a group of parameters may have several."""
    return _of_each_parameter(zero_optimizer) if stage == 3 else _of_whole_groups(zero_optimizer)


def _of_whole_groups(zero: Any) -> list[Partition]:
    partitions = []
    for index, parameters in enumerate(zero.round_robin_bit16_groups):
        group, size = zero.real_dp_process_group[index], int(zero.partition_size[index])
        begins = [rank * size for rank in range(dist.get_world_size(group))]
        cuts = []
        for parameter, first in zip(parameters, zero.round_robin_bit16_offsets[index], strict=True):
            slices = [_overlap(first, first + parameter.numel(), begin, begin + size) for begin in begins]
            cuts.append(Cut(parameter, tuple(parameter.shape), tuple(slices)))
        flat = zero.single_partition_of_fp32_groups[index]
        partitions.append(Partition(flat, tuple(cuts), index, group, dist.get_rank(group)))
    return partitions


def _overlap(first: int, end: int, partition_first: int, partition_end: int) -> Slice:
    numel = min(end, partition_end) - max(first, partition_first)
    return Slice(max(first - partition_first, 0), numel) if numel > 0 else Slice(0, 0)


def _of_each_parameter(zero: Any) -> list[Partition]:
    partitions = []
    for index, parameters in enumerate(zero.fp16_groups):
        group, offset, cuts = zero.sub_group_process_groups[index], 0, []
        for parameter in parameters:
            size, numel = parameter.partition_numel(), parameter.ds_numel
            real = [min(max(0, numel - rank * size), size) for rank in range(dist.get_world_size(group))]
            cuts.append(Cut(parameter, tuple(parameter.ds_shape), tuple(Slice(offset, each) for each in real)))
            offset += size
        flat, param_group = zero.fp32_partitioned_groups_flat[index], zero.sub_group_to_group_id[index]
        partitions.append(Partition(flat, tuple(cuts), param_group, group, dist.get_rank(group)))
    return partitions


class Shares:
    """Which rank sees which of a partition's tensors whole: `on_whole` has each computed once, on one of the ranks.

    A tensor that lies whole on a rank is that rank's. The others travel to a rank, in rounds, each to the one that has
    least to do so far. It follows from the layout alone: all ranks come to the same answer, and meet in every round,
    whatever they hold.

    Args:
        partition: its layout.
        cost: of what is computed from a tensor of a shape.
        largest: numbers of one rank that travel in a round, unless a single tensor has more.
    """

    def __init__(
        self, partition: Partition, cost: Callable[[tuple[int, ...]], float], largest: int = LARGEST_EXCHANGE
    ) -> None:
        self._partition = partition
        self._world = dist.get_world_size(partition.group)
        work = [0.0] * self._world
        self._at_home: list[Cut] = []
        travelling: list[Cut] = []
        for cut in partition.cuts:
            holders = [rank for rank, each in enumerate(cut.slices) if each.numel]
            if len(holders) > 1:
                travelling.append(cut)
            elif holders:
                work[holders[0]] += cost(cut.shape)
                self._at_home += [cut] if holders[0] == partition.rank else []
        self.rounds: list[list[list[Cut]]] = []  # of each, what goes to each rank
        for cuts in _batches(travelling, largest * self._world):
            owned: list[list[Cut]] = [[] for _ in range(self._world)]
            for cut in sorted(cuts, key=lambda each: -cost(each.shape)):
                owner = work.index(min(work))
                work[owner] += cost(cut.shape)
                owned[owner].append(cut)
            self.rounds.append(owned)

    def on_whole(
        self, read: Callable[[Cut], Tensor], compute: Callable[[Tensor], Tensor], write: Callable[[Cut, Tensor], None]
    ) -> None:
        """Compute something of every tensor whole, and hand its slices back; a collective.

        Args:
            read: this rank's slice of a tensor, (k,), all of one dtype and on the device of the group.
            compute: a whole tensor -> another of its shape and dtype.
            write: takes this rank's slice of that.
        """
        for cut in self._at_home:
            write(cut, compute(read(cut).view(cut.shape)).flatten())
        for owned in self.rounds:
            self._round(owned, read, compute, write)

    def _round(
        self,
        owned: list[list[Cut]],
        read: Callable[[Cut], Tensor],
        compute: Callable[[Tensor], Tensor],
        write: Callable[[Cut, Tensor], None],
    ) -> None:
        me, group = self._partition.rank, self._partition.group
        # What goes from this rank to each other, tensor by tensor, and what comes: of this one's tensors, from each.
        going = [[cut.slices[me].numel for cut in cuts] for cuts in owned]
        coming = [[cut.slices[rank].numel for cut in owned[me]] for rank in range(self._world)]
        mine = [read(cut) for cuts in owned for cut in cuts]
        nothing = mine[0].new_empty(0)
        pieces = exchange(mine, going, coming, group)
        del mine
        results = []
        for index, cut in enumerate(owned[me]):
            whole = torch.cat([from_rank[index] for from_rank in pieces]).view(cut.shape)
            results.append(compute(whole).flatten().split([each.numel for each in cut.slices]))
        answers = [result[rank] for rank in range(self._world) for result in results]
        pieces = exchange([nothing, *answers], coming, going, group)
        for cuts, from_rank in zip(owned, pieces, strict=True):
            for cut, piece in zip(cuts, from_rank, strict=True):
                write(cut, piece)


def exchange(
    tensors: list[Tensor], going: list[list[int]], coming: list[list[int]], group: ProcessGroup
) -> list[list[Tensor]]:
    """Send each rank its own tensors; a collective.

    Args:
        tensors: (k,) each, those for rank 0 first; at least one, if only an empty one.
        going: their sizes, by rank.
        coming: the sizes of what each rank sends to this one.
        group: the ranks.

    Returns:
        By rank, what it sent.
    """
    sent = torch.cat(tensors)
    received = sent.new_empty(sum(sum(sizes) for sizes in coming))
    dist.all_to_all_single(received, sent, [sum(sizes) for sizes in coming], [sum(sizes) for sizes in going], group)
    parts = received.split([sum(sizes) for sizes in coming])
    return [list(part.split(sizes)) if sizes else [] for part, sizes in zip(parts, coming, strict=True)]


def _batches(cuts: Iterable[Cut], largest: int) -> list[list[Cut]]:
    """Neighbours of together at most `largest` numbers, or one that has more."""
    batches: list[list[Cut]] = []
    room = 0
    for cut in cuts:
        if cut.numel > room or not batches:
            batches.append([])
            room = largest
        batches[-1].append(cut)
        room -= cut.numel
    return batches
