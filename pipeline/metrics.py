"""What a stage says while it runs: `metrics.jsonl`, TensorBoard, one-line messages, and means over ranks."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mmfoundry.pipeline.distributed import world_in

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
        self._file: TextIO | None = None
        self._writers: dict[str, SummaryWriter] = {}
        self._resumed_at: dict[str, int] = {}
        self._rewound = False

    def scalars(
        self, step: int, values: Mapping[str, float | int], phase: str = "train", tensorboard: bool = True
    ) -> None:
        """Write one line of numbers.

        Args:
            step: optimizer steps done in this phase, counted from 1.
            values: names to numbers.
            phase: which of a stage's training phases; each counts its own steps.
            tensorboard: whether they go there as well; a point every few steps is enough for people.
        """
        if not self._is_main:
            return
        if not self._rewound:
            self._cut(lambda line: True)  # drops a line that a kill cut in two
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        if self._file is None:
            self._file = (self.folder / METRICS_FILE).open("a", encoding="utf-8")
        self._file.write(json.dumps({"phase": phase, "step": step, **finite}) + "\n")
        self._file.flush()
        if self._tensorboard and tensorboard:
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

    def _cut(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        self._rewound = True
        self._close_file()
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
        """Close all files; a later `scalars` opens them again."""
        self._close_file()
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield each line of a `metrics.jsonl` as a dict; a last line that a kill cut in two is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            yield json.loads(line)


class Tally:
    """Weighted means of 0-d tensors over micro-batches and ranks, kept on their device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight: Tensor | float = 0.0

    def add(self, values: Mapping[str, Tensor], weight: Tensor | float = 1.0) -> None:
        """Count one micro-batch's values, the same names each time; `weight` is equal on all ranks."""
        self._weight = self._weight + weight
        for name, value in values.items():
            weighted = value.detach().double() * weight
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted

    def means(self, group: ProcessGroup | None) -> dict[str, Tensor]:
        """The means over everything added on all ranks, fp64, in one collective and without a wait for the device."""
        names = sorted(self._sums)
        totals = torch.stack([self._sums[name] for name in names]) / self._weight
        if group is not None:
            dist.all_reduce(totals, group=group)
            totals /= world_in(group)
        return dict(zip(names, totals.unbind(), strict=True))


class Reading:
    """Numbers on their way from the device to the host, beside what is computed there.

    Args:
        values: 0-d tensors by name; what they hold now is what is read, whatever becomes of them.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._names = list(values)
        device = next(iter(values.values())).device
        whole = torch.stack([value.to(device, torch.float64, non_blocking=True) for value in values.values()])
        self._there: torch.cuda.Event | None = None
        if whole.is_cuda:
            self._host = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=True)
            self._host.copy_(whole, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(device))
        else:
            self._host = whole

    def numbers(self) -> dict[str, float]:
        """What was read; waits for the device to come to where this was made, and no further."""
        if self._there is not None:
            self._there.synchronize()
        return dict(zip(self._names, self._host.tolist(), strict=True))
