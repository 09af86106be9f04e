"""Which sample comes when: a pure function of the position, so that an order needs neither memory nor state.

Position p is the number of samples drawn before, over all ranks together. A mixture says which source p falls to and
how many samples of that source came before (its source position q); q is sample `permute(q % n)` of the source's epoch
`q // n`, under a permutation of its own for every epoch. Rank r of W takes positions p with p % W == r, counted from
the start of a step: any number of ranks, workers and micro-batches reads one and the same order.

Only integer arithmetic is used, so that an order does not depend on the version of a random generator.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from mmfoundry.pipeline.errors import ConfigError

_MASK = (1 << 64) - 1
_SMALL = 1 << 12  # up to here a permutation is a cached table
_ROUNDS = 6
_MAX_BLOCK = 1 << 12  # positions in a mixture's block
_MIN_BLOCK = 1 << 8


@dataclass(frozen=True, slots=True)
class Draw:
    """What stands at one position: the source, its epoch, and the sample's number in the source."""

    source: int
    epoch: int
    index: int


def mix(*values: int) -> int:
    """Hash integers to 64 bits (the finaliser of splitmix64, chained); equal on every machine."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = _scramble((state ^ value & _MASK) + 0x9E3779B97F4A7C15 & _MASK)
    return state


def _scramble(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def permute(position: int, size: int, seed: int) -> int:
    """Where `position` goes under a seeded permutation of range(size), in constant memory.

    Up to 4,096 elements it is a shuffled table. Past that it is a Feistel network on the smallest even number of bits
    that holds `size`, walked until the value falls below `size` (at most four times as many values as needed, so fewer
    than four steps on average).

    Args:
        position: 0 <= position < size.
        size: number of elements, at least 1.
        seed: 0 to 2**64 - 1; another seed gives another permutation.
    """
    if size <= _SMALL:
        return _table(size, seed)[position]
    half = (size - 1).bit_length() + 1 >> 1
    low = (1 << half) - 1
    keys = _round_keys(seed)
    while True:
        left, right = position >> half, position & low
        for key in keys:
            left, right = right, left ^ _scramble(right ^ key) & low
        position = left << half | right
        if position < size:
            return position


@lru_cache(maxsize=256)
def _table(size: int, seed: int) -> tuple[int, ...]:
    return tuple(sorted(range(size), key=lambda element: mix(seed, element)))


@lru_cache(maxsize=256)
def _round_keys(seed: int) -> tuple[int, ...]:
    return tuple(mix(seed, number) for number in range(_ROUNDS))


class Order:
    """The endless order of a mixture of sources.

    Positions are cut into blocks. Every block holds the same number of samples of each source, so that the weights are
    exact in each of them, in an order of its own. Weights that are no fractions with a common denominator up to 4,096
    are rounded to whole samples of such a block.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0):
        """Fix the mixture.

        Args:
            sizes: samples in each source.
            weights: share of each source in what is drawn, in any unit; by default each sample counts alike.
            seed: of all permutations; its low 64 bits count.
        Raises:
            ConfigError: no source, an empty one, or a weight that is not positive or too small to be met.
        """
        if not sizes or any(size < 1 for size in sizes):
            raise ConfigError(f"a mixture needs sources with samples; sizes are {list(sizes)}")
        self.sizes = [int(size) for size in sizes]
        self.seed = seed
        self.counts = _block_counts([float(size) for size in sizes] if weights is None else list(weights), len(sizes))
        self.block = sum(self.counts)

    def at(self, position: int) -> Draw:
        """What stands at a position (>= 0)."""
        source, within = 0, position
        if len(self.sizes) > 1:
            block, slot = divmod(position, self.block)
            source, rank = _layout(tuple(self.counts), mix(self.seed, 1, block))[slot]
            within = block * self.counts[source] + rank
        epoch, place = divmod(within, self.sizes[source])
        return Draw(source, epoch, permute(place, self.sizes[source], mix(self.seed, 2, source, epoch)))

    def redraw(self, position: int, attempt: int) -> Draw:
        """What takes the place of a sample that could not be read: one of the same source, a function of both numbers.

        Args:
            position: the place to be filled.
            attempt: 1 for the first replacement, 2 if that could not be read either, and so on.
        """
        first = self.at(position)
        return Draw(first.source, first.epoch, mix(self.seed, 3, position, attempt) % self.sizes[first.source])


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The generator for what is random about the sample at a position: crop, caption, and so on."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed & _MASK, position))))


def rank_positions(start: int, batch_size: int, rank: int, world_size: int) -> range:
    """The positions of one rank in the step that starts at `start`; the ranks together cover it exactly.

    Raises:
        ConfigError: `batch_size` cannot be shared out evenly.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} of {world_size} ranks")
    if batch_size < 1 or batch_size % world_size:
        raise ConfigError(f"a batch of {batch_size} samples cannot be shared evenly by {world_size} ranks")
    return range(start + rank, start + batch_size, world_size)


@lru_cache(maxsize=16)
def _layout(counts: tuple[int, ...], seed: int) -> tuple[tuple[int, int], ...]:
    """For every slot of a block: its source, and how many samples of that source come before it in the block."""
    flat = [source for source, count in enumerate(counts) for _ in range(count)]
    used = [0] * len(counts)
    layout = []
    for element in _table.__wrapped__(len(flat), seed):
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
