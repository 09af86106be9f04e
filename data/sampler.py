"""Which sample comes when: a pure function of the position, so that an order needs neither memory nor state.

Position p is the number of samples drawn before, over all ranks together. A mixture says which source p falls to and
how many samples of that source came before (its source position q); q is sample `q % n` of the source's epoch `q // n`,
under a permutation of its own for every epoch. Rank r of W takes positions p with p % W == r, counted from the start of
a step: any number of ranks, workers and micro-batches reads one and the same order.

A source that fits in one window (65,536 samples, unless told otherwise) is shuffled as a whole. A larger one is
shuffled in blocks, so that what is read at one time lies in few places: see `permutation.block_permute`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mmfoundry.data.mixture import ByPasses, ByWeight, Mixture
from mmfoundry.data.permutation import RUN, WINDOW, block_permute, mix, permute, windows_of
from mmfoundry.pipeline.errors import ConfigError

__all__ = ["Draw", "Order", "Seen", "mix", "permute", "rank_positions", "sample_rng"]

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """What stands at one position: the source, its epoch, and the sample's number in the source."""

    source: int
    epoch: int
    index: int


@dataclass(frozen=True, slots=True)
class Seen:
    """How often the samples of one source were drawn.

    Attributes:
        drawn: positions that fell to the source.
        samples: samples in the source; each was drawn `drawn // samples` times, and `drawn % samples` once more.
    """

    drawn: int
    samples: int

    @property
    def unique(self) -> int:
        """Samples drawn at least once."""
        return min(self.drawn, self.samples)

    @property
    def repeats(self) -> int:
        """Draws of a sample that had been drawn before."""
        return self.drawn - self.unique


class Order:
    """The endless order of a mixture of sources.

    Attributes:
        sizes: samples in each source.
        windows: of each source, how many windows an epoch is shuffled in; 1 is a full shuffle.
        counts: samples of each source in every `block` positions that start at a multiple of `block`.
        block: the sum of `counts`.
        shares: what the counts come from, "weights" or "upsampling"; with equal counts they are two orders.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        *,
        upsampling: Sequence[float] | None = None,
        window: int = WINDOW,
    ):
        """Fix the mixture.

        Args:
            sizes: samples in each source.
            weights: share of each source in what is drawn, in any unit, exact in every block of at most 4,096
                positions. There is no common epoch then: each source goes round at a pace of its own.
            seed: of all permutations; its low 64 bits count.
            upsampling: in place of weights: how often each sample of a source comes in an epoch; 1 by default. Half a
                pass takes one half of the samples in one epoch and the other half in the next.
            window: samples of a source that are shuffled together, at least 256: what a cache should hold. A larger
                window mixes better; one of the source's size is a full shuffle.
        Raises:
            ConfigError: no source, an empty one, a window that is too small, both weights and upsampling, or one of
                them that is not positive or too small to be met.
        """
        if not sizes or any(size < 1 for size in sizes):
            raise ConfigError(f"a mixture needs sources with samples; sizes are {list(sizes)}")
        if window < RUN:
            raise ConfigError(f"window is {window}; it needs at least {RUN} samples")
        if weights is not None and upsampling is not None:
            raise ConfigError("sources have either weights or upsampling, not both; leave one out")
        self.sizes = [int(size) for size in sizes]
        self.seed = seed
        self.windows = [windows_of(size, window) for size in self.sizes]
        self.shares = "upsampling" if weights is None else "weights"
        self._mixture: Mixture
        if weights is not None:
            self._mixture = ByWeight(weights, len(sizes), seed)
        else:
            self._mixture = ByPasses(_passes(self.sizes, upsampling), seed)
        self.counts, self.block = self._mixture.counts, self._mixture.block

    @property
    def epoch_samples(self) -> int:
        """Positions in an epoch: after them every sample has come as often as its source's `upsampling` says.

        Raises:
            ConfigError: several sources with weights, which have no common epoch.
        """
        if isinstance(self._mixture, ByPasses):
            return self.block
        if len(self.sizes) == 1:
            return self.sizes[0]
        raise ConfigError("sources with weights have no common epoch; give a number of samples, or upsampling")

    def budget(self, epochs: float | None = None, samples: int | None = None) -> int | None:
        """How many positions there are until a limit; None where there is none.

        Args:
            epochs: passes over the mixture, of `epoch_samples` each; 0.5 is half of one.
            samples: positions, over all ranks: the "samples seen" of the field's tables.
        Raises:
            ConfigError: both are given, one is not positive, or there is no epoch to count.
        """
        if epochs is not None and samples is not None:
            raise ConfigError(f"a budget is in epochs ({epochs}) or in samples ({samples}), not both; leave one out")
        if samples is None and epochs is None:
            return None
        positions = samples if samples is not None else round(epochs * self.epoch_samples) if epochs else 0
        if positions < 1:
            raise ConfigError(f"a budget of {epochs if samples is None else samples} has no samples; raise it")
        return positions

    def at(self, position: int) -> Draw:
        """What stands at a position (>= 0)."""
        source, within = (0, position) if len(self.sizes) == 1 else self._mixture.at(position)
        size = self.sizes[source]
        epoch, place = divmod(within, size)
        seed = _epoch_seed(self.seed, source, epoch)
        return Draw(source, epoch, block_permute(place, size, self.windows[source], seed))

    def redraw(self, position: int, attempt: int) -> Draw:
        """What takes the place of a sample that could not be read: one of the same source, a function of both numbers.

        Args:
            position: the place to be filled.
            attempt: 1 for the first replacement, 2 if that could not be read either, and so on.
        """
        first = self.at(position)
        return Draw(first.source, first.epoch, mix(self.seed, 3, position, attempt) % self.sizes[first.source])

    def seen(self, position: int) -> list[Seen]:
        """How often the samples of each source come in all positions before this one; exact, without walking them."""
        drawn = [position] if len(self.sizes) == 1 else self._mixture.drawn(position)
        return [Seen(count, size) for count, size in zip(drawn, self.sizes, strict=True)]


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The generator for what is random about the sample at a position: crop, caption, and so on."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed & _MASK, position))))


def rank_positions(start: int, batch_size: int, rank: int, world_size: int, end: int | None = None) -> range:
    """The positions of one rank in the step that starts at `start`; the ranks together cover it exactly.

    Args:
        start: the step's first position.
        batch_size: positions in a step, over all ranks.
        rank: whose positions.
        world_size: number of ranks.
        end: where the order ends, if it does; the last step is cut there, and its shares may differ by one.
    Raises:
        ConfigError: `batch_size` cannot be shared out evenly.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} of {world_size} ranks")
    if batch_size < 1 or batch_size % world_size:
        raise ConfigError(f"a batch of {batch_size} samples cannot be shared evenly by {world_size} ranks")
    stop = start + batch_size if end is None else min(start + batch_size, end)
    return range(start + rank, stop, world_size)


@lru_cache(maxsize=1024)
def _epoch_seed(seed: int, source: int, epoch: int) -> int:
    return mix(seed, 2, source, epoch)


def _passes(sizes: list[int], upsampling: Sequence[float] | None) -> list[int]:
    """Samples of each source in an epoch."""
    factors = [1.0] * len(sizes) if upsampling is None else list(upsampling)
    if len(factors) != len(sizes) or not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise ConfigError(f"{len(sizes)} source(s) need as many upsampling factors above 0; they are {factors}")
    counts = [round(factor * size) for factor, size in zip(factors, sizes, strict=True)]
    if 0 in counts:
        small = counts.index(0)
        raise ConfigError(f"upsampling {factors[small]} of source {small} is no sample of its {sizes[small]}; raise it")
    return counts
