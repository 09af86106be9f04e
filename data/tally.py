"""Samples that could not be used: counted by source and reason, logged by key, and limited."""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfoundry.pipeline.errors import ConfigError, TooManyUnreadable

if TYPE_CHECKING:  # a worker process reads without torch
    from torch.distributed import ProcessGroup

_MAX_LINE_BYTES = 1 << 20  # of a skip, whose details are short
MIN_DRAWN = 1000  # so that one bad sample among the first few does not stop a run whose rate is low


@dataclass(frozen=True, slots=True)
class Skip:
    """One sample that was passed over.

    Attributes:
        source: the pool it belongs to.
        shard: the tar it lies in.
        key: of the sample; empty where the shard's damage hides it.
        reason: one of a small set of phrases.
        detail: what was found; may be empty.
        position: its place in the order of training, which another sample took; None if it was not drawn.
    """

    source: str
    shard: str
    key: str
    reason: str
    detail: str = ""
    position: int | None = None


class Tally:
    """Counts what is drawn and what of it is skipped, and stops the run past a limit.

    The rule: it is an error once more samples were skipped than `limit` times the samples drawn, or times 1,000 while
    fewer were drawn. A limit of 0 allows none, a limit of 1 any number.
    """

    def __init__(self, limit: float, log: Path | None = None):
        """Start counting.

        Args:
            limit: fraction of the samples drawn, 0 to 1.
            log: JSONL file that skips are appended to, one a line; several processes may share it. What a run that was
                cut off left in it, and this one meets again, is not written twice.
        Raises:
            ConfigError: the limit is no fraction.
        """
        if not 0 <= limit <= 1:
            raise ConfigError(f"max_unreadable is {limit}; it is a fraction, 0 to 1")
        self.limit, self.log = limit, log
        self._log = None if log is None else SkipLog(log)
        self.drawn = 0
        self.counts: Counter[tuple[str, str]] = Counter()  # (source, reason)

    @property
    def skipped(self) -> int:
        """Samples skipped so far."""
        return sum(self.counts.values())

    def allowed(self, drawn: int) -> float:
        """How many of `drawn` samples may be skipped."""
        return self.limit * max(drawn, MIN_DRAWN)

    def add(self, drawn: int, skips: Iterable[Skip] = ()) -> None:
        """Count samples.

        Args:
            drawn: how many were read or tried, the skipped ones among them.
            skips: those that could not be used.
        Raises:
            TooManyUnreadable: past the limit; they are in the log all the same.
        """
        skips = list(skips)
        self.drawn += drawn
        self.counts.update((skip.source, skip.reason) for skip in skips)
        if skips and self._log is not None:
            self._log.add(skips)
        if skips and self.skipped > self.allowed(self.drawn):
            self.stop()

    def restart(self, position: int = 0) -> None:
        """Count from nothing again, and expect skips from a position in the order of training on."""
        self.drawn = 0
        self.counts.clear()
        if self.log is not None:
            self._log = SkipLog(self.log, position)

    def stop(self) -> None:
        """Raise TooManyUnreadable with the counts so far."""
        reasons = Counter[str]()
        for (_, reason), count in self.counts.items():
            reasons[reason] += count
        sources = ", ".join(sorted({source for source, _ in self.counts}))
        counted = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
        where = f"; they are listed in {self.log}" if self.log is not None else ""
        raise TooManyUnreadable(
            f"{sources}: {self.skipped} of {self.drawn} samples could not be used, more than max_unreadable "
            f"({self.limit:g}) allows: {counted}{where}"
        )

    def as_metrics(self) -> dict[str, float]:
        """`drawn`, `skipped` and, by source and reason, `skipped/<source>/<reason>`: sums over ranks make sense."""
        metrics = {"drawn": float(self.drawn), "skipped": float(self.skipped)}
        for (source, reason), count in sorted(self.counts.items()):
            metrics[f"skipped/{source}/{reason}"] = float(count)
        return metrics


def joint_counts(counts: Mapping[str, float], group: "ProcessGroup | None") -> dict[str, float]:
    """Sum named counts over ranks, each of which may have names that others lack (reasons that it alone met).

    Args:
        counts: of this rank.
        group: the ranks to sum over, all of which call this; None: this process alone.
    """
    if group is None:
        return dict(counts)
    import torch
    import torch.distributed as dist

    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    mine = json.dumps(dict(counts)).encode()
    length = torch.tensor([len(mine)], device=device)
    dist.all_reduce(length, op=dist.ReduceOp.MAX, group=group)
    padded = torch.tensor(list(mine.ljust(int(length))), dtype=torch.uint8, device=device)
    gathered = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, padded, group=group)
    joint: Counter[str] = Counter()
    for each in gathered:
        joint.update(json.loads(bytes(each.tolist())))
    return dict(joint)


_Identity = tuple[str | int | None, ...]


class SkipLog:
    """A JSONL file of skips that several processes append to, and runs that go on after they were killed.

    A run that goes on makes its last steps again and meets the same skips: those that the file has are not added to
    it. No line is taken out: other processes may be writing, and the same positions give the same skips.
    """

    def __init__(self, path: Path, position: int = 0):
        """Nothing is read or made before the first skip.

        Args:
            path: of the file.
            position: in the order of training, before which no more skips will come.
        """
        self.path, self._position = path, position
        self._known: Counter[_Identity] | None = None

    def add(self, skips: Iterable[Skip]) -> None:
        """Append those that the file did not have when the first skip came."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # free again when the file is closed, also by a kill
            self._drop_torn_line()
            if self._known is None:
                self._known = Counter(self._read())
            lines = []
            for row in map(asdict, skips):
                if self._known[_identity(row)] > 0:
                    self._known[_identity(row)] -= 1
                else:
                    lines.append(json.dumps(row, ensure_ascii=False) + "\n")
            file.write("".join(lines).encode("utf-8", "backslashreplace"))

    def _drop_torn_line(self) -> None:
        """Cut off what a kill left of a line; whoever writes has the lock, so nobody is about to end it."""
        with open(self.path, "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _MAX_LINE_BYTES))
            last = file.read()
            if not last.endswith(b"\n"):
                file.truncate(size - len(last) + last.rfind(b"\n") + 1)

    def _read(self) -> Iterator[_Identity]:
        """The skips of the file that may come again."""
        with open(self.path, encoding="utf-8") as file:
            for row in map(json.loads, file):
                if row["position"] is None or row["position"] >= self._position:
                    yield _identity(row)


def _identity(row: Mapping[str, Any]) -> _Identity:
    """What two lines share that tell of the same skip; shards may have moved, so a position comes before a name."""
    if row["position"] is not None:
        return row["position"], row["key"], row["reason"]
    return row["shard"], row["key"], row["reason"], row["detail"]
