"""Packed captions beside captions that are cut behind the longest of the batch, or of its group.

    python benchmarks/text_packing.py [--quick] [--json PATH] [--device cpu|cuda] [--model ViT-B-32] [--batch N ...]

    text tower, <captions>, batch N, <peer>   forward and backward pass of the text tower alone
    step, <captions>, batch N, <peer>         one optimizer step of both towers

Ours is `text_packing: true`; peers are our own tower with captions trimmed behind the batch's longest, which is the
default, and with `text_groups: 4`. Captions are the sample pool's, or have the lengths of web captions (a lognormal
law, median 12 tokens). All take the same batches in turn, in one process, in bf16. Milliseconds are the median over
batches: on a CPU of one thread's own time, so that what else runs there counts little; on a GPU of the clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from pretrain import Batch, Ours, our_batches, web_batch
from tables import Row, print_header, print_row, smaller, write_rows

from mmfoundry.models.clip import ClipConfig
from mmfoundry.models.interop.open_clip import named_config
from mmfoundry.pipeline.distributed import init_runtime
from mmfoundry.pipeline.host_memory import keep_freed_memory

GROUPS = 4  # of captions of like length
WAYS = {"packed": (1, True), "trimmed": (1, False), f"{GROUPS} groups": (GROUPS, False)}  # groups, packed
WORK_WIDTH = 52  # of the table's first column
CPU = torch.device("cpu")


def pool_batches(config: ClipConfig, rows: int, count: int) -> list[Batch]:
    """Pairs of the sample pool."""
    batches = our_batches(config, rows, CPU)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()  # type: ignore[attr-defined]


def web_batches(config: ClipConfig, rows: int, count: int) -> list[Batch]:
    """Random pairs, captions as long as those of the web."""
    return [web_batch(config, rows, seed) for seed in range(count)]


CAPTIONS = {"web captions": web_batches, "sample pool": pool_batches}


def seconds(work: Callable[[Batch], None], batch: Batch, device: torch.device) -> float:
    """Of the processor on a CPU, of the clock on a GPU."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    work(batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def text_only(ours: Ours) -> Callable[[Batch], None]:
    """Forward and backward pass of the text tower and its projection."""

    def work(batch: Batch) -> None:
        with torch.autocast(ours.device.type, dtype=torch.bfloat16):
            text_bD = ours.model.encode_text(batch["text"])
        text_bD.sum().backward()

    return work


def in_turn(ours: Ours, work: Callable[[Batch], None], batches: list[Batch]) -> dict[str, float]:
    """Median milliseconds of each way to lay captions out; the first batch warms up."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    names = list(WAYS)
    for number, batch in enumerate(batches):
        ready = ours.prepare(batch)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            tower = ours.model.text_model
            tower.groups, tower.packed = WAYS[name]
            found[name].append(seconds(work, ready, ours.device))
    return {name: 1e3 * statistics.median(times[1:]) for name, times in found.items()}


def measure(name: str, rows: int, count: int) -> Iterator[Row]:
    """All rows of one batch size."""
    config = named_config(name)
    ours = Ours(config, rows, init_runtime())
    for captions, batches_of in CAPTIONS.items():
        batches = batches_of(config, rows, count + 1)
        for what, work in ("text tower", text_only(ours)), ("step", ours.step):
            times = in_turn(ours, work, batches)
            ours.model.zero_grad(set_to_none=False)  # what the tower alone left is no step's
            for peer in list(WAYS)[1:]:
                yield smaller(f"{what}, {captions}, batch {rows}, {peer}", times["packed"], times[peer], "ms", 1)


def main() -> None:
    """Run the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer batches")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", help="open_clip's name")
    parser.add_argument("--batch", type=int, nargs="+", help="pairs of a step")
    parser.add_argument("--steps", type=int, help="timed batches")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(1)  # threads that wait for one another would count as work
        keep_freed_memory()
    model = arguments.model or ("ViT-S-32-alt" if arguments.quick else "ViT-B-32")
    sizes = arguments.batch or ([256, 1024] if arguments.device == "cuda" else [16] if arguments.quick else [32, 64])
    rows = []
    print_header(WORK_WIDTH, note=f"   ({model})")
    for row in (
        row for size in sizes for row in measure(model, size, arguments.steps or (2 if arguments.quick else 6))
    ):
        print_row(row, WORK_WIDTH)
        rows.append(row)
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
