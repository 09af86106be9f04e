"""What the order of samples costs, and how well it mixes.

    python benchmarks/sampler.py [--quick] [--json PATH]

Three parts, one table. A cell is empty where a peer has no such thing, or where it would not fit in memory.

- start-up and a draw, at 1M, 10M and 1B simulated samples, each in a process of its own. Peer: PyTorch's
  `DistributedSampler`, from making it to its first sample.
- the index of 10M samples: 1,000 shards of 10,000 samples with a picture, a caption and a JSON; bytes on disk, and the
  time and memory to open them all.
- mixing: a pool whose every shard is of one kind, the worst case. How much more the mean over a batch of 4,096 varies
  from batch to batch than with independent draws, which is 1. Peers: open_clip's buffers (webdataset's own shuffle of
  5,000, first of 1,000, on 8 ranks of 4 workers, shards shuffled whole), a window of as many samples made of whole
  shards, and the full shuffle itself.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import webdataset
from tables import Row, write_rows

from mmfoundry.data.index import index_path, open_index
from mmfoundry.data.permutation import WINDOW
from mmfoundry.data.reader import Pool
from mmfoundry.data.sampler import Order

SIZES = {"1M": 10**6, "10M": 10**7, "1B, simulated": 10**9}
PEER_LIMIT = 10**8  # samples; past it the peer's list takes more than 4 GB
SHARDS, PER_SHARD = 1000, 10_000
BATCH, RANKS, WORKERS = 4096, 8, 4
Rows = list[Row]


def row(work: str, ours: float, peer: float | None, unit: str) -> Row:
    """One line of the table; less is better in all of them."""
    ratio = round(peer / ours, 3) if peer is not None and ours else None
    return {"work": work, "ours": _short(ours), "peer": _short(peer), "unit": unit, "ratio": ratio}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def alone(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, so that memory can be told apart."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


def own_memory() -> int:
    """Bytes that this process has for itself; pages of mapped files, which the system takes back at will, are not."""
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))


def our_start(size: int, repeats: int) -> tuple[float, float, float]:
    """Milliseconds to the first sample, MB after draws all over the order, microseconds a draw in a row."""
    Order([size], seed=0).at(0)  # loads what is loaded once
    before = own_memory()
    times = []
    for seed in range(1, repeats + 1):
        start = time.perf_counter()
        order = Order([size], seed=seed)
        order.at(0)
        times.append(time.perf_counter() - start)
    for position in range(0, 3 * size, size // 100):
        order.at(position)
    grown = own_memory() - before
    draws = []
    for start_at in range(0, repeats * 2000, 2000):
        start = time.perf_counter()
        for position in range(start_at, start_at + 2000):
            order.at(position)
        draws.append((time.perf_counter() - start) / 2000)
    return 1e3 * statistics.median(times), grown / 1e6, 1e6 * statistics.median(draws)


def peer_start(size: int, repeats: int) -> tuple[float, float]:
    """The same two numbers of PyTorch's sampler."""
    from torch.utils.data import DistributedSampler

    before = own_memory()
    times = []
    for seed in range(repeats):
        start = time.perf_counter()
        samples = iter(DistributedSampler(range(size), num_replicas=1, rank=0, seed=seed))  # type: ignore[arg-type]
        next(samples)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times), (own_memory() - before) / 1e6


def start_up(quick: bool) -> Rows:
    """Time and memory until the first sample, and the time of a draw."""
    rows = []
    for name, size in SIZES.items():
        first, memory, draw = alone(our_start, size, 5 if quick else 15)
        peer = alone(peer_start, size, 1 if quick else 3) if size <= PEER_LIMIT else (None, None)
        rows.append(row(f"first sample of {name}", first, peer[0], "ms"))
        rows.append(row(f"memory of the order of {name}", memory, peer[1], "MB"))
        rows.append(row(f"a draw from {name}", draw, None, "us"))
    return rows


def write_shard(path: Path, samples: int) -> None:
    """A tar with img2dataset's names and members; the payloads are one byte, as only their places are indexed."""
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            for extension in ("jpg", "json", "txt"):
                member = tarfile.TarInfo(f"{number:09d}.{extension}")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"x"))


def open_pool(folder: Path) -> tuple[float, float, int]:
    """Seconds and MB to open a pool of indexed shards, and its samples."""
    before = own_memory()
    start = time.perf_counter()
    pool = Pool(folder)
    return time.perf_counter() - start, (own_memory() - before) / 1e6, len(pool)


def index_rows(work: Path) -> Rows:
    """Size on disk and opening of the index of 10M samples."""
    folder = work / "shards"
    folder.mkdir()
    first = folder / "00000.tar"
    write_shard(first, PER_SHARD)
    index = index_path(open_index(first).shard)
    for number in range(1, SHARDS):
        shard = folder / f"{number:05d}.tar"
        os.link(first, shard)
        shutil.copyfile(index, index_path(shard))  # indexes of 1,000 equal shards differ in nothing
    size = sum(path.stat().st_size for path in folder.glob(f"*{index.suffix}"))
    opened = [alone(open_pool, folder) for _ in range(3)]
    if opened[0][2] != SHARDS * PER_SHARD:
        raise RuntimeError(f"{opened[0][2]} samples were opened")
    return [
        row("index of 10M samples on disk", size / 1e6, None, "MB"),
        row("opening the index of 10M", statistics.median(time for time, _, _ in opened), None, "s"),
        row("memory of the open index of 10M", statistics.median(memory for _, memory, _ in opened), None, "MB"),
    ]


def shard_sizes(samples: int) -> list[int]:
    """Shards of 5,000 to 15,000 samples, as filtering leaves them."""
    rng = np.random.default_rng(0)
    sizes: list[int] = []
    while (left := samples - sum(sizes)) > 0:
        sizes.append(min(left, int(rng.integers(5000, 15_001))))
    return sizes


def our_order(sizes: list[int], window: int) -> np.ndarray:
    """The first epoch of ours, as sample numbers."""
    order = Order([sum(sizes)], seed=1, window=window)
    return np.fromiter((order.at(position).index for position in range(sum(sizes))), np.int64)


def whole_shards(sizes: list[int], window: int) -> np.ndarray:
    """Shards shuffled, then the samples of as many shards as a window holds."""
    rng = np.random.default_rng(1)
    starts = [0, *accumulate(sizes)]
    windows: list[list[np.ndarray]] = [[]]
    for shard in rng.permutation(len(sizes)):
        if sum(map(len, windows[-1])) + sizes[shard] > window:
            windows.append([])
        windows[-1].append(np.arange(starts[shard], starts[shard + 1]))
    return np.concatenate([rng.permutation(np.concatenate(part)) for part in windows if part])


def open_clip_order(sizes: list[int], window: int) -> np.ndarray:
    """What 8 ranks of 4 workers draw, batch after batch of all ranks, until one stream ends; `window` is not used."""
    starts = [0, *accumulate(sizes)]
    shards = list(range(len(sizes)))
    random.Random(1).shuffle(shards)

    def stream(rank: int, worker: int) -> Iterator[int]:
        mine = shards[rank::RANKS][worker::WORKERS]
        samples = (number for shard in mine for number in range(starts[shard], starts[shard + 1]))
        return webdataset.filters._shuffle(samples, 5000, 1000, rng=random.Random(100 * rank + worker))

    streams = [[stream(rank, worker) for worker in range(WORKERS)] for rank in range(RANKS)]
    drawn: list[int] = []
    for step in range(sum(sizes) // BATCH):
        parts = [list(islice(streams[rank][step % WORKERS], BATCH // RANKS)) for rank in range(RANKS)]
        if sum(map(len, parts)) < BATCH:
            break
        drawn += [number for part in parts for number in part]
    return np.array(drawn)


def noise(order: np.ndarray, sizes: list[int]) -> float:
    """Spread of the mean over a batch of a quantity that is one random number a shard; 1 is that of independent draws.

    Worked out from each batch's shares of the shards, for which no such numbers need be drawn.
    """
    shard_of = np.arange(len(sizes)).repeat(sizes)
    batches = shard_of[order[: len(order) // BATCH * BATCH]].reshape(-1, BATCH)
    shares = np.stack([np.bincount(batch, minlength=len(sizes)) for batch in batches]) / BATCH
    pool = np.array(sizes) / sum(sizes)
    spread = ((shares - pool) ** 2).sum(1).mean()
    return float(np.sqrt(spread / ((pool * (1 - pool)).sum() / BATCH)))


def mixing(quick: bool) -> Rows:
    """How much less evenly batches are composed than under a full shuffle."""
    samples = 10**6 if quick else 4 * 10**6
    sizes = shard_sizes(samples)
    ours = noise(our_order(sizes, WINDOW), sizes)
    work, unit = f"batch noise, window {WINDOW}", "times"
    rows = [
        row(f"{work}: open_clip", ours, noise(open_clip_order(sizes, WINDOW), sizes), unit),
        row(f"{work}: whole shards", ours, noise(whole_shards(sizes, WINDOW), sizes), unit),
        row(f"{work}: full shuffle", ours, noise(our_order(sizes, samples), sizes), unit),
    ]
    for window in () if quick else (WINDOW // 4, WINDOW * 4):
        mine, peer = (noise(order(sizes, window), sizes) for order in (our_order, whole_shards))
        rows.append(row(f"batch noise, window {window}: whole shards", mine, peer, unit))
    return rows


def main() -> None:
    """Run the parts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, and a smaller pool to mix")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    arguments = parser.parse_args()
    rows = start_up(arguments.quick)
    with tempfile.TemporaryDirectory() as folder:
        rows += index_rows(Path(folder))
    rows += mixing(arguments.quick)
    print(f"\n{'work':<48}{'ours':>10}{'peer':>10}  {'unit':<8}ratio")
    for each in rows:
        peer, ratio = ("" if each[name] is None else each[name] for name in ("peer", "ratio"))
        print(f"{each['work']:<48}{each['ours']:>10}{peer:>10}  {each['unit']:<8}{ratio}")
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
