"""Shards -> batches of one rank, endlessly, in an order that can be left and taken up again anywhere.

    loader = Loader([Source("shards/")], batch_size=1024, encode=encode, rank=rank, world_size=world_size)
    for batch in loader:
        train_step(batch)
        state = loader.state_dict()  # {"samples_consumed": ...}: what was handed out, not what was read ahead

What a batch holds depends on the seed and its position alone: not on ranks, workers, or where a run was cut off.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from mmfoundry.data.decode import DecodeLimits, UnreadableSample
from mmfoundry.data.index import ShardSpec
from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import Sample, to_sample
from mmfoundry.data.sampler import Draw, Order, rank_positions, sample_rng
from mmfoundry.data.tally import Skip, Tally
from mmfoundry.pipeline.errors import ConfigError

Batch = dict[str, Any]
Encode = Callable[[Sample, np.random.Generator], Mapping[str, Any]]
Collate = Callable[[list[Mapping[str, Any]]], Batch]
_MAX_REDRAWS = 100  # in a row, for one place


@dataclass(frozen=True)
class Source:
    """Shards to draw from, or a pool that is open already, and their share in what is drawn (in any unit)."""

    shards: "ShardSpec | Pool"
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class _Made:
    batch: Batch | None  # None: given up, the skips are past the limit
    drawn: int
    skips: list[Skip]


class Loader:
    """Batches of one rank: an endless iterable with a position.

    A sample that cannot be read, or whose `encode` raises UnreadableSample, is counted in `tally`, logged, and replaced
    by another of its source; which one is a function of its position, so that all other places stay as they were.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        batch_size: int,
        encode: Encode,
        collate: Collate | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 1,
        prefetch: int = 2,
        max_unreadable: float = 0.01,
        skip_log: Path | None = None,
        limits: DecodeLimits | None = None,
        cache_bytes: int = 0,
    ):
        """Open the sources.

        Args:
            sources: what to draw from; their weights are exact in every block of the order.
            batch_size: samples per step over all ranks; each rank gets `batch_size / world_size` of them.
            encode: sample and its own generator -> named arrays (of one shape over the batch), numbers or strings.
                Called in worker threads; the sample is read-only where `cache_bytes` is set. Everything random must
                come from the generator.
            collate: list of what `encode` returned -> batch; by default `stack`.
            seed: of the order and of every sample's generator.
            rank: this process's number.
            world_size: number of processes that share each step.
            num_workers: threads that make batches; 0 makes each one when it is asked for.
            prefetch: batches that each thread may be ahead.
            max_unreadable: fraction of the samples drawn by this rank; see `tally.Tally` for the rule.
            skip_log: JSONL file to which skipped samples are appended.
            limits: what an image may weigh.
            cache_bytes: decoded samples are kept in memory until they take this much; for pools that fit.
        Raises:
            ConfigError: the batch cannot be shared evenly, or a number is out of range.
            MissingInput: a source has no shards or no readable sample.
            TooManyUnreadable: the shards' indexes are past `max_unreadable` already.
        """
        if num_workers < 0 or prefetch < 1:
            raise ConfigError(f"num_workers is {num_workers}, prefetch {prefetch}; needs at least 0 and 1")
        rank_positions(0, batch_size, rank, world_size)  # refuses what cannot be shared
        self.pools = [source.shards if isinstance(source.shards, Pool) else Pool(source.shards) for source in sources]
        self.order = Order([len(pool) for pool in self.pools], [source.weight for source in sources], seed)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.tally = Tally(max_unreadable, skip_log)
        self._encode, self._collate = encode, collate or stack
        self._num_workers, self._prefetch = num_workers, prefetch
        self._limits = limits or DecodeLimits()
        self._cache = _Cache(cache_bytes)
        self._consumed = 0
        self._report_damage(max_unreadable, skip_log)

    @property
    def samples_consumed(self) -> int:
        """Samples handed out so far, over all ranks."""
        return self._consumed

    def state_dict(self) -> dict[str, Any]:
        """The position, and what the order depends on; plain JSON, equal on all ranks."""
        return {
            "samples_consumed": self._consumed,
            "seed": self.seed,
            "sources": [
                {"name": pool.name, "samples": size, "bytes": pool.total_bytes, "per_block": count}
                for pool, size, count in zip(self.pools, self.order.sizes, self.order.counts, strict=True)
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a saved position; ranks, workers and batch size may differ from those that saved it.

        Takes effect when iteration starts anew.

        Raises:
            ConfigError: seed, sources or weights are not those of the saved state, so that the order is another one.
        """
        mine = self.state_dict()
        for what in ("seed", "sources"):
            was, now = (_identity(state, what), _identity(mine, what))
            if was != now:
                raise ConfigError(f"the saved position is in another order of samples: its {what} {was}, now {now}")
        self._consumed = int(state["samples_consumed"])

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present position on, without end."""
        start = self._consumed
        if self._num_workers == 0:
            while True:
                made = self._make(start)
                start = self._account(made, start)
                yield made.batch  # type: ignore[misc]  # _account has raised where there is none
        ahead: deque[Future[_Made]] = deque()
        workers = ThreadPoolExecutor(self._num_workers, thread_name_prefix="loader")
        try:
            next_start = start
            while True:
                while len(ahead) < self._num_workers * self._prefetch:
                    ahead.append(workers.submit(self._make, next_start))
                    next_start += self.batch_size
                made = ahead.popleft().result()
                start = self._account(made, start)
                yield made.batch  # type: ignore[misc]
        finally:
            workers.shutdown(wait=True, cancel_futures=True)

    def _account(self, made: _Made, start: int) -> int:
        """Count a batch as consumed; counting here, in order, keeps what was read ahead out of the numbers."""
        self.tally.add(made.drawn, made.skips)
        if made.batch is None:
            self.tally.stop()
        self._consumed = start + self.batch_size
        return self._consumed

    def _make(self, start: int) -> _Made:
        """Read and encode this rank's share of the step that starts at `start`."""
        positions = rank_positions(start, self.batch_size, self.rank, self.world_size)
        rows: list[Mapping[str, Any]] = []
        skips: list[Skip] = []
        # a batch that is past what the whole run up to its end may skip need not be finished
        enough = self.tally.allowed(start + self.batch_size)
        for position in positions:
            draw = self.order.at(position)
            for attempt in range(1, _MAX_REDRAWS + 1):
                try:
                    rows.append(self._row(draw, position))
                    break
                except UnreadableSample as error:
                    skips.append(self._skip(draw, position, error))
                    draw = self.order.redraw(position, attempt)
                if len(skips) > enough or attempt == _MAX_REDRAWS:
                    return _Made(None, len(rows) + len(skips), skips)
        return _Made(self._collate(rows), len(rows) + len(skips), skips)

    def _row(self, draw: Draw, position: int) -> Mapping[str, Any]:
        sample = self._cache.get(draw)
        if sample is None:
            sample = to_sample(self.pools[draw.source].get(draw.index), self._limits)
            self._cache.put(draw, sample)
        try:
            return self._encode(sample, sample_rng(self.seed, position))
        except UnreadableSample:
            raise
        except Exception as error:
            error.add_note(f"while encoding sample {sample.key} of {self.pools[draw.source].name}")
            raise

    def _skip(self, draw: Draw, position: int, error: UnreadableSample) -> Skip:
        pool = self.pools[draw.source]
        index, local = pool.locate(draw.index)
        return Skip(pool.name, str(index.shard), index.key(local), error.reason, error.detail, position)

    def _report_damage(self, limit: float, log: Path | None) -> None:
        """Log what the indexes could not read; once, by the first rank. Every rank stops where it is too much."""
        damage = Tally(limit, log if self.rank == 0 else None)
        for pool in self.pools:
            skips = [
                Skip(pool.name, str(shard), found.name, found.reason, f"at byte {found.offset}")
                for shard, found in pool.damage
            ]
            damage.add(len(pool) + len(skips), skips)
        self.damage = damage


class _Cache:
    """Decoded samples up to a number of bytes; what does not fit is decoded again, as an order without repeats within
    an epoch would only push out what is needed sooner."""

    def __init__(self, max_bytes: int):
        self._free = max_bytes
        self._samples: dict[tuple[int, int], Sample] = {}
        self._lock = Lock()

    def get(self, draw: Draw) -> Sample | None:
        return self._samples.get((draw.source, draw.index))

    def put(self, draw: Draw, sample: Sample) -> None:
        size = sample.image.nbytes + 2048  # a guess at captions and metadata
        with self._lock:
            if size > self._free or (draw.source, draw.index) in self._samples:
                return
            sample.image.flags.writeable = False
            self._samples[draw.source, draw.index] = sample
            self._free -= size


def stack(rows: list[Mapping[str, Any]]) -> Batch:
    """Collate by name: arrays and numbers are stacked into tensors (b, ...) of their own dtype, others listed."""
    import torch

    batch: Batch = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if isinstance(first, torch.Tensor):
            batch[name] = torch.stack(values)
        elif isinstance(first, np.ndarray | np.number | int | float | bool):
            batch[name] = torch.from_numpy(np.stack(values))
        else:
            batch[name] = values
    return batch


def _identity(state: Mapping[str, Any], what: str) -> Any:
    if what == "seed":
        return state["seed"]
    return [(source["samples"], source["bytes"], source["per_block"]) for source in state["sources"]]  # may be moved
