"""What a stage says while it runs: `metrics.jsonl`, TensorBoard, one-line messages, and tallies that cost no sync."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
MESSAGES_FILE = "messages.txt"
TENSORBOARD_FOLDER = "tensorboard"


class StageLog:
    """A stage's numbers and messages; rank 0 writes, the other ranks stay silent.

    Each line of `metrics.jsonl` is `{"phase": ..., "step": ..., name: number, ...}` with floats in full precision
    (`repr`, which reads back bit for bit; non-finite ones as null). Lines are flushed as they are written, so that a
    kill loses none. TensorBoard's event files lie under `tensorboard/<phase>`.

    Args:
        folder: where the files go; created at the first line.
        is_main: whether this rank writes.
        tensorboard: whether event files are written as well.
    """

    def __init__(self, folder: Path, is_main: bool = True, tensorboard: bool = True) -> None:
        self.folder = folder
        self._is_main = is_main
        self._tensorboard = tensorboard
        self._writers: dict[str, SummaryWriter] = {}
        self._resumed_at: dict[str, int] = {}
        self._rewound = False

    def scalars(self, step: int, values: Mapping[str, float | int], phase: str = "train") -> None:
        """Write one line of numbers.

        Args:
            step: optimizer steps done in this phase, counted from 1.
            values: names to numbers.
            phase: which of a stage's training phases; each counts its own steps.
        """
        if not self._is_main:
            return
        if not self._rewound:
            self._cut(lambda line: True)  # drops a line that a kill cut in two
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"phase": phase, "step": step, **finite}) + "\n")
        if self._tensorboard:
            writer = self._writer(phase)
            for name, value in values.items():
                writer.add_scalar(name, value, step)

    def say(self, message: str) -> None:
        """Show one line to the person who watches, and keep it in `messages.txt` with the time (UTC)."""
        if not self._is_main:
            return
        print(message, file=sys.stderr, flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / MESSAGES_FILE).open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {message}\n")

    def rewind(self, phase: str, step: int) -> None:
        """Drop the lines that a resumed run will write again: those of `phase` after `step`, and a torn last line."""
        if not self._is_main:
            return
        self._resumed_at[phase] = step
        self._cut(lambda line: line.get("phase") != phase or line["step"] <= step)

    def _cut(self, keep: Any) -> None:
        self._rewound = True
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS_FILE
        if not path.exists():
            return
        kept = "".join(json.dumps(line) + "\n" for line in read_metrics(path) if keep(line))
        if kept == path.read_text(encoding="utf-8"):
            return
        aside = path.with_name(path.name + ".tmp")
        with aside.open("w", encoding="utf-8") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)

    def _writer(self, phase: str) -> SummaryWriter:
        if phase not in self._writers:
            # Imported here: it takes a second that a stage without numbers need not spend.
            from torch.utils.tensorboard import SummaryWriter

            resumed_at = self._resumed_at.get(phase)
            self._writers[phase] = SummaryWriter(
                str(self.folder / TENSORBOARD_FOLDER / phase),
                # TensorBoard hides what an earlier, cut-off run wrote after the step we resumed from.
                purge_step=None if resumed_at is None else resumed_at + 1,
            )
        return self._writers[phase]

    def flush(self) -> None:
        """Hand TensorBoard's queued events to the disk; `metrics.jsonl` is always there already."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Close TensorBoard's files; a later `scalars` opens new ones."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield each line of a `metrics.jsonl` as a dict; a last line that a kill cut in two is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            yield json.loads(line)


class Tally:
    """Weighted means of 0-d tensors, kept on their device: nothing is read to the host until `means`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor | float] = {}

    def add(self, values: Mapping[str, Tensor], weight: Tensor | float = 1.0) -> None:
        """Count each value with the given weight."""
        for name, value in values.items():
            weighted = value.detach().double() * weight
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def means(self) -> dict[str, float]:
        """Read the weighted means to the host, one transfer in all, and start anew."""
        if not self._sums:
            return {}
        names = list(self._sums)
        means = torch.stack([self._sums[name] / self._weights[name] for name in names]).tolist()
        self._sums.clear()
        self._weights.clear()
        return dict(zip(names, means, strict=True))
