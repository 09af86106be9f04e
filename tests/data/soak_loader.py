"""Is resident memory flat? Reads many samples by worker processes and by threads; ends with 1 if memory grew.

    make soak
    python -m tests.data.soak_loader --samples 200000 --workers 2

Memory is that of this process and its workers together: the proportional set size (shared pages counted once) without
pages of files, whose share falls and rises with what other programs map; each twentieth of the way. Flat means that no
later value is over 5% above that at a tenth of the way.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

from mmfoundry.data import Loader, PairEncoder, Source
from mmfoundry.data.pairs import pad_text
from mmfoundry.data.shards import write_shards
from tests.data.conftest import encode, smooth

TOLERANCE = 0.05
POINTS = 20


def pool(folder: Path, count: int) -> Path:
    """Small JPEGs and PNGs of different sizes, with captions of different lengths."""

    def rows() -> Iterator[dict]:
        for number in range(count):
            picture = smooth(number, 32 + number % 33, 32 + number % 47)
            kind = "JPEG" if number % 2 else "PNG"
            yield {
                "__key__": f"{number:06d}",
                "jpg" if number % 2 else "png": encode(picture, kind),
                "txt": "\n".join(f"caption {number} " + "word " * (number % 50) for _ in range(1 + number % 3)),
                "json": {"uid": f"{number:032x}"},
            }

    write_shards(rows(), folder, max_count=500)
    return folder


def memory() -> int:
    """Bytes of this process and those that it started, pages that they share counted once, those of files not."""
    total = 0
    for process in [os.getpid(), *children(os.getpid())]:
        with suppress(OSError):  # it may have ended since
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    total += int(line.split()[1]) * 1024
    return total


def children(process: int) -> list[int]:
    """Processes that a process has started."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(file.read_text().rpartition(")")[2].split()[1]) == process:
                found.append(int(file.parent.name))
    return found


def soak(shards: Path, samples: int, kind: str, workers: int, batch_size: int) -> bool:
    """Read, print the memory on the way, and say whether it stayed flat."""
    loader = Loader(
        [Source(shards)],
        batch_size=batch_size,
        encode=PairEncoder(64),
        finish=pad_text,
        num_workers=workers,
        workers=kind,  # type: ignore[arg-type]
        samples=samples,
    )
    found = []
    every = max(1, samples // POINTS // batch_size)
    with closing(iter(loader)) as batches:  # type: ignore[type-var]
        for step, _ in enumerate(batches, start=1):
            if step % every == 0:
                found.append(memory())
                print(f"{kind:8} {loader.samples_consumed:8d} samples  {found[-1] / 2**20:8.1f} MiB", flush=True)
    start = found[len(found) // 10]
    worst = max(found[len(found) // 10 :])
    print(f"{kind:8} grew by {worst / start - 1:+.1%} after the first tenth; {TOLERANCE:.0%} is allowed")
    return worst <= start * (1 + TOLERANCE)


def main() -> int:
    """Soak both kinds of workers."""
    parser = argparse.ArgumentParser(description="Is the loader's memory flat?")
    parser.add_argument("--samples", type=int, default=200_000, help="samples to read by each kind of workers")
    parser.add_argument("--workers", type=int, default=2, help="worker processes, or threads")
    parser.add_argument("--pool", type=int, default=2_000, help="samples in the pool")
    parser.add_argument("--batch", type=int, default=64, help="samples in a batch")
    parser.add_argument("--kind", choices=["process", "thread"], help="one kind of workers only")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmfoundry-soak-") as folder:
        shards = pool(Path(folder) / "shards", given.pool)
        kinds = [given.kind] if given.kind else ["process", "thread"]
        flat = [soak(shards, given.samples, kind, given.workers, given.batch) for kind in kinds]
    return 0 if all(flat) else 1


if __name__ == "__main__":
    sys.exit(main())
