"""Positions -> one rank's share of a batch; what threads and worker processes do, in the same way.

A `BatchMaker` has no state of its own besides a cache, so any of them, anywhere, makes the same batch of a position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event, Lock

import numpy as np

from mmfoundry.data.decode import DecodeLimits, UnreadableSample
from mmfoundry.data.gather import Batch, Gather, Row
from mmfoundry.data.reader import Pool
from mmfoundry.data.recycled import Recycled
from mmfoundry.data.sample import Sample, to_sample
from mmfoundry.data.sampler import Draw, Order, rank_positions, sample_rng
from mmfoundry.data.shared_batch import Slot
from mmfoundry.data.tally import MIN_DRAWN, Skip

Encode = Callable[[Sample, np.random.Generator], Row]
Collate = Callable[[list[Row]], Batch]
_MAX_REDRAWS = 100  # in a row, for one place


@dataclass(frozen=True, slots=True)
class Made:
    """What came of one step's share.

    Attributes:
        batch: its fields, arrays in the memory that was given; None: given up, the skips are past the limit.
        drawn: samples read or tried.
        skips: those of them that could not be used.
    """

    batch: Batch | None
    drawn: int
    skips: list[Skip]


class BatchMaker:
    """Reads, encodes and gathers one rank's samples of a step."""

    def __init__(
        self,
        pools: Sequence[Pool],
        order: Order,
        encode: Encode,
        collate: Collate | None = None,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        max_unreadable: float = 0.01,
        limits: DecodeLimits | None = None,
        cache_bytes: int = 0,
        end: int | None = None,
    ):
        """Fix what is read and how; arguments as those of `loader.Loader`.

        Args:
            pools: where samples lie.
            order: which sample stands at which position.
            encode: sample to row.
            collate: rows to batch; None gathers rows by name, straight into their place.
            batch_size: samples of a step over all ranks.
            rank: whose share is made.
            world_size: ranks that share a step.
            max_unreadable: past this fraction a batch is given up.
            limits: what an image may weigh.
            cache_bytes: decoded samples kept in memory.
            end: position at which the order ends; None: never.
        """
        self.pools, self.order = list(pools), order
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._encode, self.collate = encode, collate
        self._max_unreadable = max_unreadable
        self._limits = limits or DecodeLimits()
        self.cache_bytes = cache_bytes
        self._cache = _Cache(cache_bytes)
        self._memory = Recycled()
        self.end = end

    def make(self, start: int, slot: Slot | None = None) -> Made:
        """Read and encode this rank's share of the step that starts at `start`.

        Args:
            start: the first position of the step.
            slot: where the batch's arrays are to lie; on the heap if None.
        """
        begun = self.begin(start, slot)
        begun.work()
        return begun.made()

    def begin(self, start: int, slot: Slot | None = None) -> Begun:
        """The same, not made yet: any number of threads may work on it."""
        # The end of the order cuts the last step short
        positions = rank_positions(start, self.batch_size, self.rank, self.world_size, self.end)
        # a batch that is past what the whole run up to its end may skip need not be finished
        enough = self._max_unreadable * max(start + self.batch_size, MIN_DRAWN)
        return Begun(self, positions, enough, slot)

    def named(self, position: int) -> str:
        """The sample that stands at a position, for messages: its key and its pool."""
        draw = self.order.at(position)
        return f"{self.pools[draw.source].key(draw.index)} of {self.pools[draw.source].name}"

    def row(self, draw: Draw, position: int) -> Row:
        """Read and encode one sample; the position is what its generator depends on.

        Raises:
            UnreadableSample: it cannot be used.
        """
        sample = self._cache.get(draw)
        if sample is None:
            sample = to_sample(self.pools[draw.source].get(draw.index), self._limits, lazy=True)
            if self.cache_bytes:
                self._cache.put(draw, sample)
        try:
            return self._encode(sample, sample_rng(self.order.seed, position))
        except UnreadableSample:
            raise
        except Exception as error:
            error.add_note(f"while encoding sample {sample.key} of {self.pools[draw.source].name}")
            raise

    def gather(self, rows: int, slot: Slot | None) -> Gather:
        """Where the rows of a batch are laid down."""
        return Gather(rows, slot.empty if slot is not None else self._memory.empty)

    def collated(self, rows: list[Row]) -> Batch:
        """What `collate` makes of rows."""
        assert self.collate is not None
        return self.collate(rows)


class Begun:
    """A batch in the making: its places are filled in any order, by all the threads that work on it.

    What comes out is what one thread would make, in order: also where the batch is given up.
    """

    def __init__(self, maker: BatchMaker, positions: range, enough: float, slot: Slot | None):
        """See `BatchMaker.begin`.

        Args:
            maker: reads and encodes.
            positions: of the batch's places.
            enough: more skips than this, and it is given up.
            slot: where the arrays are to lie.
        """
        self._maker, self._positions, self._enough, self._slot = maker, positions, enough, slot
        self._rows: list[Row] | None = None if maker.collate is None else [{}] * len(positions)
        self._gather: Gather | None = maker.gather(len(positions), slot)
        self._skips: list[list[Skip]] = [[] for _ in positions]
        self._unfilled: set[int] = set()  # places for which nothing was found
        self._errors: dict[int, BaseException] = {}
        self._next = self._busy = self._skipped = 0
        self._lock = Lock()
        self._finished = Event()
        if not positions:  # the last step is shorter than the number of ranks
            self._finished.set()

    def work(self) -> None:
        """Fill places until all are taken; those that other threads took may not be filled then."""
        while (place := self._take()) is not None:
            try:
                self._fill(place)
            except BaseException as error:  # raised by `made`, where the batch is waited for
                self._errors[place] = error
                self.stop()
                if not isinstance(error, Exception):
                    raise
            finally:
                self._done()

    def stop(self) -> None:
        """Let no more places be taken."""
        with self._lock:
            self._next = len(self._positions)

    def made(self) -> Made:
        """Wait until all places that were taken are filled; call it once.

        Raises:
            Exception: what `encode` raised, for the first place that it did.
        """
        self._finished.wait()
        gather, self._gather = self._gather, None  # or a thread that comes late would keep the memory
        skips: list[Skip] = []
        for place, of_place in enumerate(self._skips):
            for skip in of_place:
                skips.append(skip)
                if len(skips) > self._enough:
                    return Made(None, place + len(skips), skips)
            if place in self._unfilled:
                return Made(None, place + len(skips), skips)
            if place in self._errors:
                raise self._errors[place]
        if not self._positions:
            return Made({}, 0, [])
        assert gather is not None
        batch = gather.batch() if self._rows is None else self._maker.collated(self._rows)
        return Made(batch, len(self._positions) + len(skips), skips)

    def _take(self) -> int | None:
        with self._lock:
            if self._next == len(self._positions) or self._skipped > self._enough:
                return None
            self._next += 1
            self._busy += 1
            return self._next - 1

    def _done(self) -> None:
        with self._lock:
            self._busy -= 1
            if not self._busy and (self._next == len(self._positions) or self._skipped > self._enough):
                self._finished.set()

    def _fill(self, place: int) -> None:
        """Read, encode and lay down the sample of a place, or another of its source if it cannot be used."""
        maker, position, skips = self._maker, self._positions[place], self._skips[place]
        draw = maker.order.at(position)
        if self._slot is not None:
            self._slot.mark(position)
        for attempt in range(1, _MAX_REDRAWS + 1):
            try:
                row = maker.row(draw, position)
            except UnreadableSample as error:
                skips.append(maker.pools[draw.source].skip(draw.index, error, position))
                with self._lock:
                    self._skipped += 1
                draw = maker.order.redraw(position, attempt)
            else:
                if self._rows is not None:
                    self._rows[place] = row
                elif self._gather is not None:
                    self._gather.put(place, row)
                return
            if len(skips) > self._enough:
                return
        self._unfilled.add(place)


class _Cache:
    """Samples (pixels, of JPEGs the file) up to a number of bytes; what does not fit is decoded again, as an order
    without repeats within an epoch would only push out what is needed sooner."""

    def __init__(self, max_bytes: int):
        self._free = max_bytes
        self._samples: dict[tuple[int, int], Sample] = {}
        self._lock = Lock()

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return _Cache, (self._free,)  # another process fills its own

    def get(self, draw: Draw) -> Sample | None:
        return self._samples.get((draw.source, draw.index))

    def put(self, draw: Draw, sample: Sample) -> None:
        # read-only from here on; JPEGs stay encoded, so that what a transform makes of one never depends on the cache
        size = sample.freeze() + 2048  # a guess at captions and metadata
        with self._lock:
            if size > self._free or (draw.source, draw.index) in self._samples:
                return
            self._samples[draw.source, draw.index] = sample
            self._free -= size
