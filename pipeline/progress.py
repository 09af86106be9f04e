"""Progress of long work: a bar with an ETA on a terminal, else a line every 15 s, so that logs stay short."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

LINE_EVERY_S = 15.0


class Progress:
    """Counts finished units; the base class shows nothing.

    Args:
        total: units in all; None where nobody knows.
        description: what is being done: "filter: reading shards".
        unit: what is counted: "samples", "steps".
    """

    def __init__(self, total: int | None, description: str, unit: str) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done = 0

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more units as done; `note` is shown beside them, e.g. the loss."""
        self.done += count


class _Lines(Progress):
    def __init__(self, total: int | None, description: str, unit: str) -> None:
        super().__init__(total, description, unit)
        self._started = self._shown = time.monotonic()
        self._first: int | None = None

    def advance(self, count: int = 1, note: str = "") -> None:
        super().advance(count, note)
        if self._first is None:
            self._first = self.done  # a resumed run's first call brings what was done before; not this run's speed
            self._started = time.monotonic()
        now = time.monotonic()
        if now - self._shown >= LINE_EVERY_S:
            self._shown = now
            print(self._line(now, note), file=sys.stderr, flush=True)

    def _line(self, now: float, note: str) -> str:
        rate = (self.done - (self._first or 0)) / max(now - self._started, 1e-9)
        of = f"/{self.total} {self.unit}, {self.done / max(self.total, 1):.0%}" if self.total else f" {self.unit}"
        left = f", {_clock((self.total - self.done) / rate)} left" if self.total and rate > 0 else ""
        return f"{self.description}: {self.done}{of}{left}{', ' + note if note else ''}"


class _Bar(Progress):
    def __init__(self, total: int | None, description: str, unit: str, bars: Bars) -> None:
        super().__init__(total, description, unit)
        self._bars = bars
        self._task = bars.add_task(description, total=total, unit=unit, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        super().advance(count, note)
        self._bars.update(self._task, advance=count, note=note)


@contextlib.contextmanager
def progress_bar(
    total: int | None, description: str, unit: str = "samples", visible: bool = True
) -> Iterator[Progress]:
    """Show progress while the block runs.

    Args:
        total: units in all; None where nobody knows.
        description: what is being done.
        unit: what is counted, plural.
        visible: False on ranks other than the main one.
    """
    if not visible:
        yield Progress(total, description, unit)
    elif not sys.stderr.isatty():
        yield _Lines(total, description, unit)
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        # printed lines go above the bar, but not to the terminal where they were sent to a file
        to_terminal = sys.stdout.isatty()
        with Bars(*columns, console=Console(stderr=True), transient=True, redirect_stdout=to_terminal) as bars:
            yield _Bar(total, description, unit, bars)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
