"""Which source a position falls to: by weights, exact in every block, or by passes, exact in every epoch.

Both are pure functions of the position, and both answer in reverse: how often each source was drawn before a position.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Protocol

from mmfoundry.data.permutation import mix, shuffled_range
from mmfoundry.pipeline.errors import ConfigError

_MAX_BLOCK = 1 << 12  # positions in a block
_MIN_BLOCK = 1 << 8


class Mixture(Protocol):
    """Shares of several sources.

    Attributes:
        counts: samples of each source in every `block` positions that start at a multiple of it.
        block: their sum.
    """

    counts: tuple[int, ...]
    block: int

    def at(self, position: int) -> tuple[int, int]:
        """The source that a position falls to, and how many samples of it come before."""

    def drawn(self, position: int) -> list[int]:
        """Samples of each source in all positions before this one."""


class ByWeight:
    """The same number of samples of each source in every block of at most 4,096, in an order of its own.

    Weights that are no fractions with a common denominator up to 4,096 are rounded to whole samples of such a block.
    """

    def __init__(self, weights: Sequence[float], sources: int, seed: int):
        """Fix the shares.

        Raises:
            ConfigError: not as many weights as sources, or one that is not positive or too small to be met.
        """
        self.counts = tuple(_block_counts(list(weights), sources))
        self.block = sum(self.counts)
        self._seed = seed

    def at(self, position: int) -> tuple[int, int]:
        """The source that a position falls to, and how many samples of it come before."""
        block, slot = divmod(position, self.block)
        source, rank = _layout(self.counts, mix(self._seed, 1, block))[slot]
        return source, block * self.counts[source] + rank

    def drawn(self, position: int) -> list[int]:
        """Samples of each source in all positions before this one."""
        block, slot = divmod(position, self.block)
        drawn = [block * count for count in self.counts]
        for source, _ in _layout(self.counts, mix(self._seed, 1, block))[:slot]:
            drawn[source] += 1
        return drawn


class ByPasses:
    """A fixed number of samples of each source in every epoch, spread evenly over it.

    An epoch is cut into parts of about 4,096 positions. Before part b of B lie floor(count * b / B) samples of a
    source: within one of its even share, and all of them at the end. Inside a part the order is shuffled.
    """

    def __init__(self, counts: Sequence[int], seed: int):
        """Fix the shares.

        Args:
            counts: samples of each source in an epoch, each at least 1.
            seed: of the order inside the parts.
        """
        self.counts = tuple(counts)
        self.block = sum(self.counts)
        self._parts = -(-self.block // _MAX_BLOCK)
        self._seed = seed

    def at(self, position: int) -> tuple[int, int]:
        """The source that a position falls to, and how many samples of it come before."""
        epoch, place = divmod(position, self.block)
        part = self._part(epoch, place)
        source, rank = part.layout[place - part.start]
        return source, epoch * self.counts[source] + part.before[source] + rank

    def drawn(self, position: int) -> list[int]:
        """Samples of each source in all positions before this one."""
        epoch, place = divmod(position, self.block)
        part = self._part(epoch, place)
        drawn = [epoch * count + before for count, before in zip(self.counts, part.before, strict=True)]
        for source, _ in part.layout[: place - part.start]:
            drawn[source] += 1
        return drawn

    def _part(self, epoch: int, place: int) -> "_Part":
        number = place * self._parts // self.block  # right, or a little too low: every source was rounded down
        while True:
            part = _part(self.counts, self._parts, number, mix(self._seed, 4, epoch))
            if place < part.start + len(part.layout):
                return part
            number += 1


@dataclass(frozen=True, slots=True)
class _Part:
    start: int  # position in the epoch
    before: tuple[int, ...]  # samples of each source in the epoch before it
    layout: tuple[tuple[int, int], ...]


@lru_cache(maxsize=16)
def _part(counts: tuple[int, ...], parts: int, number: int, seed: int) -> _Part:
    before = tuple(count * number // parts for count in counts)
    own = tuple(count * (number + 1) // parts - first for count, first in zip(counts, before, strict=True))
    return _Part(sum(before), before, _layout.__wrapped__(own, mix(seed, number)))


@lru_cache(maxsize=16)
def _layout(counts: tuple[int, ...], seed: int) -> tuple[tuple[int, int], ...]:
    """For every slot of a block: its source, and how many samples of that source come before it in the block."""
    flat = [source for source, count in enumerate(counts) for _ in range(count)]
    used = [0] * len(counts)
    layout = []
    for element in shuffled_range(len(flat), seed):
        source = flat[element]
        layout.append((source, used[source]))
        used[source] += 1
    return tuple(layout)


def _block_counts(weights: list[float], sources: int) -> list[int]:
    """Samples of each source in a block: exact where a block of at most `_MAX_BLOCK` allows it."""
    if len(weights) != sources or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError(f"{sources} source(s) need as many weights above 0; they are {weights}")
    exact = [Fraction(weight).limit_denominator(10**6) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact] if total else []
    block = math.lcm(*(share.denominator for share in shares))
    if shares and block <= _MAX_BLOCK and all(shares):
        block *= -(-_MIN_BLOCK // block)
        return [int(share * block) for share in shares]
    wanted = [weight / sum(weights) * _MAX_BLOCK for weight in weights]
    counts = [int(want) for want in wanted]
    by_remainder = sorted(range(sources), key=lambda source: (counts[source] - wanted[source], source))
    for source in by_remainder[: _MAX_BLOCK - sum(counts)]:
        counts[source] += 1
    if 0 in counts:
        small = counts.index(0)
        raise ConfigError(
            f"weight {weights[small]} of source {small} is below 1 sample in {_MAX_BLOCK}; raise it or leave it out"
        )
    return counts
