"""Shards -> batches of one rank, endlessly, in an order that can be left and taken up again anywhere.

    loader = Loader([Source("shards/")], batch_size=1024, encode=encode, rank=rank, world_size=world_size)
    for batch in loader:
        train_step(batch)
        state = loader.state_dict()  # {"samples_consumed": ...}: what was handed out, not what was read ahead

What a batch holds depends on the seed and its position alone: not on ranks, workers, or where a run was cut off.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmfoundry.data.batch_maker import BatchMaker, Collate, Encode, Made
from mmfoundry.data.decode import DecodeLimits
from mmfoundry.data.device_batches import on_device
from mmfoundry.data.gather import Batch, stack
from mmfoundry.data.index import ShardSpec
from mmfoundry.data.permutation import WINDOW
from mmfoundry.data.reader import Pool
from mmfoundry.data.sampler import Order, rank_positions
from mmfoundry.data.tally import Tally, joint_counts
from mmfoundry.data.workers import in_processes, in_this_thread, in_threads
from mmfoundry.pipeline.errors import ConfigError

if TYPE_CHECKING:  # torch takes a second to import, and a worker process does without
    import torch
    from torch.distributed import ProcessGroup

__all__ = ["Batch", "Collate", "Encode", "Loader", "Source", "stack"]


@dataclass(frozen=True)
class Source:
    """Shards to draw from, and how often.

    Attributes:
        shards: where they are, or a pool that is open already.
        weight: share in what is drawn, in any unit; not looked at where a source has `upsampling`.
        upsampling: how often each sample comes in an epoch of the mixture; where one source has it, all must.
    """

    shards: ShardSpec | Pool
    weight: float = 1.0
    upsampling: float | None = None


class Loader:
    """Batches of one rank: an iterable with a position, endless unless told otherwise.

    A sample that cannot be read, or whose `encode` raises UnreadableSample, is counted in `tally`, logged, and replaced
    by another of its source; which one is a function of its position, so that all other places stay as they were.

    Args:
        sources: what to draw from; their weights are exact in every block of the order.
        batch_size: samples per step over all ranks; each rank gets `batch_size / world_size` of them.
        encode: sample and its own generator -> named arrays (of one shape over the batch, or `Ragged.one(array)`),
            numbers or strings. Called where batches are made: by threads at once, the consumer's among them; with
            `workers="process"` it must be a function or object of a module. The sample is read-only where
            `cache_bytes` is set. Everything random must come from the generator.
        collate: list of what `encode` returned -> batch, where batches are made. By default fields are gathered by
            name: arrays and numbers to tensors (b, ...), `Ragged` rows to one `Ragged`, others to lists.
        seed: of the order and of every sample's generator.
        rank: this process's number.
        world_size: number of processes that share each step.
        num_workers: threads or processes that make batches; 0 makes each one when it is asked for. Besides threads,
            who waits for a batch helps to make it.
        workers: "thread": they share memory, and Python's lock for what is not decoding. "process": they share
            nothing but the batches, which lie in shared memory; start the program under
            `if __name__ == "__main__":`.
        prefetch: batches that each worker may be ahead.
        max_unreadable: fraction of the samples drawn by this rank; see `tally.Tally` for the rule.
        skip_log: JSONL file to which skipped samples are appended; a run that goes on adds none that it has already.
        limits: what an image may weigh.
        cache_bytes: decoded samples are kept in memory until they take this much; for pools that fit. Worker
            processes have an equal part of it each.
        epochs: passes over the mixture after which iteration ends; the last step may be a smaller one, and its
            shares may differ by one between ranks.
        samples: the same as a number of samples, over all ranks and counted from position 0.
        window: samples of a large source that are shuffled together; see `sampler.Order`.
        finish: what is done to a batch of tensors in this process before it is handed out (padding, say).
        device: where batches are handed out. For a CUDA device they are pinned and copied on a stream of their own
            while the batch before is computed on.
        group: ranks over which `counters` and `state_dict` sum what was skipped; those are then to be called on
            all of them. None: this rank's alone.
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
        workers: Literal["thread", "process"] = "thread",
        prefetch: int = 2,
        max_unreadable: float = 0.01,
        skip_log: str | os.PathLike[str] | None = None,
        limits: DecodeLimits | None = None,
        cache_bytes: int = 0,
        epochs: float | None = None,
        samples: int | None = None,
        window: int = WINDOW,
        finish: Callable[[Batch], Batch] | None = None,
        device: torch.device | str | None = None,
        group: ProcessGroup | None = None,
    ):
        """Open the sources; arguments as above.

        Raises:
            ConfigError: the batch cannot be shared evenly, or a number is out of range.
            MissingInput: a source has no shards or no readable sample.
            TooManyUnreadable: the shards' indexes are past `max_unreadable` already.
        """
        if num_workers < 0 or prefetch < 1:
            raise ConfigError(f"num_workers is {num_workers}, prefetch {prefetch}; needs at least 0 and 1")
        if workers not in ("thread", "process"):
            raise ConfigError(f"workers is {workers!r}; thread and process are known")
        rank_positions(0, batch_size, rank, world_size)  # refuses what cannot be shared
        self.pools = [source.shards if isinstance(source.shards, Pool) else Pool(source.shards) for source in sources]
        self.order = _order(self.pools, sources, seed, window)
        self._end = self.order.budget(epochs, samples)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        log = None if skip_log is None else Path(skip_log)
        self.tally = Tally(max_unreadable, log)
        in_process = workers == "process" and num_workers > 0
        self._maker = BatchMaker(
            self.pools,
            self.order,
            encode,
            None if collate is stack else collate,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            max_unreadable=max_unreadable,
            limits=limits,
            cache_bytes=cache_bytes // num_workers if in_process else cache_bytes,
            end=self._end,
        )
        self._num_workers, self._workers, self._prefetch = num_workers, workers, prefetch
        self._finish, self._device, self._group = finish, device, group
        self._before: dict[str, float] = {}  # counters of the runs that this one goes on from
        self._consumed = 0
        self._report_damage(max_unreadable, log)

    @property
    def samples_consumed(self) -> int:
        """Samples handed out so far, over all ranks."""
        return self._consumed

    @property
    def epoch_samples(self) -> int:
        """Samples of a pass over the mixture, over all ranks.

        Raises:
            ConfigError: several sources with weights, which have no common epoch.
        """
        return self.order.epoch_samples

    def state_dict(self) -> dict[str, Any]:
        """The position, what the order depends on, and what was skipped so far; plain JSON.

        Equal on all ranks but for `counters`, which are the joint ones where a `group` was given.
        """
        return {
            "samples_consumed": self._consumed,
            "counters": self.counters(),
            **self._order_state(),
        }

    def _order_state(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "shares": self.order.shares,
            "sources": [
                {
                    "name": pool.name,
                    "samples": len(pool),
                    "bytes": pool.total_bytes,
                    "per_block": self.order.counts[number],
                    "windows": self.order.windows[number],
                }
                for number, pool in enumerate(self.pools)
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a saved position; ranks, workers and batch size may differ from those that saved it.

        Takes effect when iteration starts anew.

        Raises:
            ConfigError: seed, sources or weights are not those of the saved state, so that the order is another one.
        """
        mine = self._order_state()
        for what in ("seed", "shares", "sources"):
            was, now = (_identity(state, what), _identity(mine, what))
            if was != now:
                raise ConfigError(f"the saved position is in another order of samples: its {what} {was}, now {now}")
        self._consumed = int(state["samples_consumed"])
        self._before = {str(name): float(count) for name, count in state.get("counters", {}).items()}
        self.tally.restart(self._consumed)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present position on, without end unless `epochs` or `samples` set one."""
        start = self._consumed
        with closing(self._ahead(start)) as ahead:
            for made in ahead:
                # counting here, in order, keeps what was read ahead out of the numbers
                self.tally.add(made.drawn, made.skips)
                if made.batch is None:
                    self.tally.stop()
                    return
                start = min(start + self.batch_size, self._end or start + self.batch_size)
                self._consumed = start
                if made.batch:
                    yield made.batch
                del made  # else its memory is not free while the next is waited for

    def _ahead(self, start: int) -> Generator[Made, None, None]:
        if self._num_workers == 0:
            made = in_this_thread(self._maker, start)
        elif self._workers == "thread":
            made = in_threads(self._maker, start, self._num_workers, self._prefetch)
        else:
            made = in_processes(self._maker, start, self._num_workers, self._prefetch)
        return on_device(made, self._device, self._finish)

    def counters(self) -> dict[str, float]:
        """`drawn`, `skipped` and `skipped/<source>/<reason>` since the run's first start, summed over `group`.

        With a group it must be called on all of its ranks.
        """
        counts = joint_counts(self.tally.as_metrics(), self._group)
        return {name: counts.get(name, 0.0) + self._before.get(name, 0.0) for name in sorted({*counts, *self._before})}

    def seen(self) -> dict[str, float]:
        """By source, over all ranks, of the samples handed out: `seen/`, how many; `unique/`, how many different ones;
        `repeats/`, how many had come before. Exact, by the order: a replacement counts as what it stands for."""
        counts = Counter[str]()
        for pool, seen in zip(self.pools, self.order.seen(self._consumed), strict=True):
            for what, count in (("seen", seen.drawn), ("unique", seen.unique), ("repeats", seen.repeats)):
                counts[f"{what}/{pool.name}"] += count
        return {name: float(count) for name, count in counts.items()}

    def _report_damage(self, limit: float, log: Path | None) -> None:
        """Log what the indexes could not read; once, by the first rank. Every rank stops where it is too much."""
        damage = Tally(limit, log if self.rank == 0 else None)
        for pool in self.pools:
            skips = pool.damage_skips()
            damage.add(len(pool) + len(skips), skips)
        self.damage = damage


def _order(pools: Sequence[Pool], sources: Sequence[Source], seed: int, window: int) -> Order:
    sizes = [len(pool) for pool in pools]
    upsampling = [source.upsampling for source in sources]
    if all(factor is None for factor in upsampling):
        return Order(sizes, [source.weight for source in sources], seed, window=window)
    if any(factor is None for factor in upsampling):
        raise ConfigError("either all sources have upsampling or none has; give the others 1")
    return Order(sizes, None, seed, upsampling=[factor for factor in upsampling if factor is not None], window=window)


def _identity(state: Mapping[str, Any], what: str) -> Any:
    if what == "seed":
        return state["seed"]
    if what == "shares":
        return state.get("shares", "weights")  # there was nothing else once
    # by content, as shards may be moved; sources that fit in one window say nothing about its size
    return [(each["samples"], each["bytes"], each["per_block"], each.get("windows", 1)) for each in state["sources"]]
