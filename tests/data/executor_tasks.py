"""Tasks for tests of executors: worker processes import them by name."""

import os
import signal
import time
from pathlib import Path

from mmfoundry.data.table import write_parquet
from mmfoundry.pipeline.errors import DamagedInput, MmfoundryError

# what this process remembers; a worker that lives on still has it at its next job
REMEMBERED: list[int] = []


class TwoPartError(MmfoundryError):
    """A user error that cannot be rebuilt from its text."""

    def __init__(self, first: str, second: str):
        super().__init__(f"{first} and {second}")


def square(job: int) -> int:
    return job * job


def told(job: int) -> tuple[int, int, dict[str, str | None], int]:
    """Process, jobs done before in this process, what it was started with, and polars' threads."""
    import polars as pl

    REMEMBERED.append(job)
    time.sleep(0.05)  # so that one worker does not do them all
    names = ("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return os.getpid(), len(REMEMBERED), {name: os.environ.get(name) for name in names}, pl.thread_pool_size()


def dies_once(job: tuple[Path, int]) -> int:
    """Ends its worker in the first of the jobs that are numbered 3, and leaves a trace."""
    folder, number = job
    trace = folder / "died"
    if number == 3 and not trace.exists():
        trace.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def dies(job: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leaves(job: object) -> None:
    os._exit(7)


def damaged(job: int) -> int:
    if job == 2:
        raise DamagedInput(f"part {job}: cut off")
    return job


def two_parts(job: int) -> int:
    raise TwoPartError("one", "two")


def bug(job: int) -> int:
    return 1 // (job - job)


def waits(job: Path) -> None:
    """Says that it has begun, and goes on for long."""
    (job / str(os.getpid())).touch()
    time.sleep(60)


def waits_after_first(job: tuple[Path, int]) -> int:
    folder, number = job
    if number:
        (folder / str(os.getpid())).touch()
        time.sleep(60)
    else:
        while not any(folder.iterdir()):
            time.sleep(0.01)
    return number


def writes_table(job: tuple[Path, int, Path | None]) -> int:
    """Makes a part's table; with a trace to leave, it says once who it is, and waits to be killed or let go."""
    import numpy as np
    import polars as pl

    folder, number, trace = job
    if trace is not None and not trace.exists():
        trace.write_text(str(os.getpid()))
        while not trace.with_suffix(".go").exists():
            time.sleep(0.02)
    rng = np.random.default_rng(number)
    table = pl.DataFrame({"uid": rng.integers(0, 1 << 60, 5000), "score": rng.random(5000, dtype=np.float32)})
    write_parquet(table.filter(pl.col("score") > 0.5).sort("uid"), folder / f"{number:05d}.parquet")
    return int(table["uid"].sum() % 1000)
