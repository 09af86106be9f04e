"""Samples that could not be used: counted by source and reason, logged by key, and limited."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmfoundry.pipeline.errors import ConfigError, TooManyUnreadable

if TYPE_CHECKING:  # a worker process reads without torch
    from torch.distributed import ProcessGroup

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
            log: JSONL file that skips are appended to, one a line; several processes may share it.
        Raises:
            ConfigError: the limit is no fraction.
        """
        if not 0 <= limit <= 1:
            raise ConfigError(f"max_unreadable is {limit}; it is a fraction, 0 to 1")
        self.limit, self.log = limit, log
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
        if skips and self.log is not None:
            append_jsonl(self.log, skips)
        if skips and self.skipped > self.allowed(self.drawn):
            self.stop()

    def restart(self) -> None:
        """Count from nothing again."""
        self.drawn = 0
        self.counts.clear()

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


def append_jsonl(path: Path, skips: Iterable[Skip]) -> None:
    """Append skips to a JSONL file in one write, so that lines of several processes do not mix."""
    lines = "".join(json.dumps(asdict(skip), ensure_ascii=False) + "\n" for skip in skips)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(descriptor, lines.encode("utf-8", "backslashreplace"))
    finally:
        os.close(descriptor)
