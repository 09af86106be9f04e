"""What our loader gives against the loaders that people train CLIP with, on the same pictures.

    python benchmarks/loader.py [--quick] [--json PATH] [--device cpu|cuda] [--peers open_clip ...] [--work FOLDER]

Every side turns the same encoded pictures and captions into batches of normalised float32 images of 224 pixels on the
device (RandomResizedCrop with scale (0.9, 1) and bicubic resize, as open_clip trains) and CLIP's token ids. The sides
run in turn in one run, each in an environment where its versions fit, stopped while it is another's turn.

open_clip: its `get_wds_dataset`. webdataset: `WebDataset` and `WebLoader`, which is torch's DataLoader.
mosaicml-streaming: `StreamingDataset`, its shards converted beforehand. decode: no loader at all but libjpeg-turbo
decoding the same bytes from memory; there a ratio of 0.75 is what we ask of ourselves. Our workers are threads, and the
consumer works with them while it waits for a batch, which neither the peers' consumers nor the bare decode's do.

The first run fetches the peers' environments and photographs into `--work` (git ignores it); indexes and conversions
are made before anything is timed. Memory is that of all processes of a side, shared pages counted once; the pools are
small, which spares the peers most of what their shuffle buffers take.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "loader_peers"))
from environments import REQUIREMENTS, environment_python, fetch_photographs
from pictures import SIZES, Size, picture_bytes, pool_folder, read_photographs, write_pool
from processes import Side
from tables import Row, faster, print_table, smaller, write_rows


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        workers: numbers of workers that are tried.
        batch: samples a batch.
        rounds: turns that each side gets.
        seconds: that a turn takes at least.
    """

    workers: tuple[int, ...]
    batch: int
    rounds: int
    seconds: float


QUICK = Effort(workers=(1,), batch=16, rounds=2, seconds=0.3)
FULL = Effort(workers=(1, 2), batch=32, rounds=5, seconds=2.0)


@dataclass
class Measured:
    """One side in one configuration: samples/s of each turn, seconds to the first batch, MB of memory."""

    rates: list[float]
    first_s: float = 0.0
    memory_mb: float = 0.0

    @property
    def rate(self) -> float:
        """Samples/s of the middle turn."""
        return statistics.median(self.rates)


def measure(sides: Sequence[Side], pool: Path, workers: int, effort: Effort, device: str) -> dict[str, Measured]:
    """Run the sides in turn over one pool.

    Returns:
        By the side's name.
    """
    found = {side.name: Measured([]) for side in sides}
    order = {"pool": str(pool), "workers": workers, "batch": effort.batch, "device": device}
    for side in sides:
        found[side.name].first_s = side.ask(do="open", **order)["seconds"]
    for _ in range(effort.rounds):
        for side in sides:
            # the first batch was begun in an earlier turn
            turn = side.ask(do="run", seconds=effort.seconds, skip=1)
            found[side.name].rates.append(turn["samples"] / turn["seconds"])
    for side in sides:
        found[side.name].memory_mb = side.memory_mb()
        side.ask(do="close")
    return found


def rows_of(found: dict[str, Measured], size: Size, workers: int, sample_mb: float) -> list[Row]:
    """Rows of one pool and number of workers, ours against each peer; a ratio above 1 means ours is better."""
    ours = found["ours"]
    suffix = "" if workers == 1 else f" {workers} workers"
    rows = []
    for name, peer in found.items():
        if name == "ours":
            continue
        work = f"{name} {size.name}{suffix}"
        rows.append(faster(work, ours.rate, peer.rate, "samples/s"))
        rows.append(faster(work, ours.rate * sample_mb, peer.rate * sample_mb, "MB/s"))
        if name != "decode":
            rows.append(smaller(f"first batch, {work}", ours.first_s, peer.first_s, "s"))
            rows.append(smaller(f"memory, {work}", ours.memory_mb, peer.memory_mb, "MB"))
    return rows


def run(peers: Sequence[str], work: Path, effort: Effort, device: str, sizes: Sequence[Size] = SIZES) -> list[Row]:
    """Make what is missing in `work`, then measure every size with every number of workers.

    Args:
        peers: keys of `REQUIREMENTS`; ours and the bare decode are always measured.
        work: folder for environments and pictures, kept between runs.
        effort: how much is measured.
        device: where batches are to stand, "cpu" or "cuda".
        sizes: what pictures.
    Raises:
        SystemExit: something could not be fetched, or a side failed.
    """
    pools = {size.name: pool_folder(work, size) for size in sizes}
    if not all(pool.exists() for pool in pools.values()):
        photographs = read_photographs(fetch_photographs(work))
        for size in sizes:
            write_pool(pools[size.name], size, photographs)
    pythons = {"ours": Path(sys.executable), **{peer: environment_python(work, peer) for peer in peers}}
    rows = []
    with ExitStack() as stack:
        start = [stack.enter_context(Side(name, python)) for name, python in pythons.items()]
        bare = stack.enter_context(Side("decode", Path(sys.executable)))
        for side in [*start, bare]:
            side.wait()
        for size in sizes:
            pool = pools[size.name]
            pictures = picture_bytes(pool)
            sample_mb = sum(map(len, pictures)) / len(pictures) / 1e6
            sides = [*start, bare] if size.extension == "jpg" else start
            for side in sides:
                side.ask(do="prepare", pool=str(pool))
            for workers in effort.workers:
                rows += rows_of(measure(sides, pool, workers, effort, device), size, workers, sample_mb)
    return rows


def main() -> None:
    """Run the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 worker, fewer and shorter turns")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--peers", nargs="*", choices=list(REQUIREMENTS), default=list(REQUIREMENTS))
    work = Path(__file__).parent.parent / ".bench"
    parser.add_argument("--work", type=Path, default=work, help="environments and pictures, kept (default: .bench)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the sides are ended too
    start = time.perf_counter()
    rows = run(arguments.peers, arguments.work.resolve(), QUICK if arguments.quick else FULL, arguments.device)
    print_table(rows, width=52)
    print(f"{time.perf_counter() - start:.0f} s, {arguments.device}")
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
