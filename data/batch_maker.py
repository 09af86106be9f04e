"""Positions -> one rank's share of a batch; what threads and worker processes do, in the same way.

A `BatchMaker` has no state of its own besides a cache, so any of them, anywhere, makes the same batch of a position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np

from mmfoundry.data.decode import DecodeLimits, UnreadableSample
from mmfoundry.data.gather import Batch, Gather, Row
from mmfoundry.data.reader import Pool
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
        self._encode, self._collate = encode, collate
        self._max_unreadable = max_unreadable
        self._limits = limits or DecodeLimits()
        self.cache_bytes = cache_bytes
        self._cache = _Cache(cache_bytes)
        self.end = end

    def make(self, start: int, slot: Slot | None = None) -> Made:
        """Read and encode this rank's share of the step that starts at `start`.

        Args:
            start: the first position of the step.
            slot: where the batch's arrays are to lie; on the heap if None.
        """
        # The end of the order cuts the last step short
        positions = rank_positions(start, self.batch_size, self.rank, self.world_size, self.end)
        rows: list[Row] = []
        gather = Gather(len(positions), slot.empty) if slot is not None else Gather(len(positions))
        add = gather.add if self._collate is None else rows.append
        skips: list[Skip] = []
        # a batch that is past what the whole run up to its end may skip need not be finished
        enough = self._max_unreadable * max(start + self.batch_size, MIN_DRAWN)
        for done, position in enumerate(positions):
            draw = self.order.at(position)
            if slot is not None:
                slot.mark(position)
            for attempt in range(1, _MAX_REDRAWS + 1):
                try:
                    row = self._row(draw, position)
                except UnreadableSample as error:
                    skips.append(self.pools[draw.source].skip(draw.index, error, position))
                    draw = self.order.redraw(position, attempt)
                else:
                    add(row)
                    break
                if len(skips) > enough or attempt == _MAX_REDRAWS:
                    return Made(None, done + len(skips), skips)
        if not positions:  # the last step is shorter than the number of ranks
            return Made({}, 0, [])
        batch = gather.batch() if self._collate is None else self._collate(rows)
        return Made(batch, len(positions) + len(skips), skips)

    def named(self, position: int) -> str:
        """The sample that stands at a position, for messages: its key and its pool."""
        draw = self.order.at(position)
        return f"{self.pools[draw.source].key(draw.index)} of {self.pools[draw.source].name}"

    def _row(self, draw: Draw, position: int) -> Row:
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
