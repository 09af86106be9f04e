"""Memory and time of the contrastive losses as ranks are added, against open_clip's.

    python benchmarks/loss_memory.py [--quick] [--json PATH] [--device cpu|cuda]

Each rank is a process of its own (gloo) with the same number of pairs; what is measured is one forward and backward
pass of the loss alone, from embeddings to their gradients. Memory is the highest sum of what the allocator gave out,
from torch's profiler (on a GPU from its allocator), without the embeddings themselves. Time is that of the rank's
processor, on one thread, so that other ranks and other work do not count; on a GPU it is time by the clock. The peer is
open_clip's `ClipLoss(local_loss=True, gather_with_grad=True)`, its memory-saving form, and `SigLipLoss` as it is by
default. Ours and the peer's run in turn, on the same embeddings; losses and gradients are compared before anything is
timed.

On a GPU there is one rank (NCCL wants a device for each), with more pairs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tables import Row, print_header, print_row, smaller, write_rows
from torch import Tensor

from mmfoundry.models.clip import ClipOutput
from mmfoundry.models.objectives import OBJECTIVES
from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

declare_missing_ops()

from open_clip.loss import ClipLoss, SigLipLoss  # noqa: E402  (imports torchvision)

WIDTH, WORK_WIDTH = 512, 44  # of embeddings; of the table's first column
OBJECTIVE_NAMES = ("tiled_info_nce", "siglip")
Loss = Callable[[ClipOutput], Tensor]


def embeddings(rows: int, rank: int, device: torch.device) -> ClipOutput:
    """Random unit embeddings of this rank's pairs, with gradients wanted of all parts."""
    generator = torch.Generator().manual_seed(rank)
    parts = [F.normalize(torch.randn(rows, WIDTH, generator=generator), dim=1) for _ in "it"]
    parts += [torch.tensor(1 / 0.07), torch.tensor(-10.0)]
    return ClipOutput(*(part.to(device).requires_grad_() for part in parts))


def losses(name: str, rank: int, world: int) -> dict[str, Loss]:
    """Our loss and open_clip's."""
    group = dist.group.WORLD if world > 1 else None
    peers: dict[str, Loss] = {
        "tiled_info_nce": lambda output: ClipLoss(True, True, rank=rank, world_size=world)(*output[:3]),
        "siglip": lambda output: SigLipLoss(rank=rank, world_size=world)(*output),
    }
    return {"ours": lambda output: OBJECTIVES[name](output, {}, group)["loss"], "peer": peers[name]}


def both_ways(loss: Loss, output: ClipOutput, device: torch.device) -> list[Tensor]:
    """The loss and its gradients."""
    value = loss(output)
    found = [value.detach(), *torch.autograd.grad(value, output[:2])]
    if device.type == "cuda":
        torch.cuda.synchronize()
    return found


def peak_bytes(loss: Loss, output: ClipOutput, device: torch.device) -> int:
    """The most that one pass holds at a time, the embeddings left out."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both_ways(loss, output, device)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        both_ways(loss, output, device)
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(name: str, rows: int, rank: int, world: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Peak bytes and median seconds of ours and of the peer's, on this rank."""
    output, both = embeddings(rows, rank, device), losses(name, rank, world)
    ours, peers = (both_ways(loss, output, device) for loss in both.values())
    torch.testing.assert_close(ours, peers, rtol=1e-4, atol=1e-6)
    del ours, peers
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {who: [] for who in both}
    for _ in range(repeats):
        for who, loss in both.items():
            if world > 1:
                dist.barrier()
            start = clock()
            both_ways(loss, output, device)
            seconds[who].append(clock() - start)
    found: dict[str, Any] = {who: {"seconds": statistics.median(each)} for who, each in seconds.items()}
    for who, loss in both.items():
        found[who]["bytes"] = peak_bytes(loss, output, device)
    return found


def one_rank(pipe: Connection, port: int, rank: int, world: int, rows: int, repeats: int, device_name: str) -> None:
    """A rank's process: join, measure every objective, answer."""
    device = torch.device(device_name)
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    pipe.send({name: measure(name, rows, rank, world, repeats, device) for name in OBJECTIVE_NAMES})
    if world > 1:
        dist.destroy_process_group()


def run_world(world: int, rows: int, repeats: int, device: str) -> dict[str, Any]:
    """Measure with so many ranks; the slowest and the largest of them count."""
    context = multiprocessing.get_context("spawn" if device == "cuda" else "fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ends = [context.Pipe() for _ in range(world)]
    ranks = [
        context.Process(target=one_rank, args=(theirs, port, rank, world, rows, repeats, device), daemon=True)
        for rank, (_, theirs) in enumerate(ends)
    ]
    for process in ranks:
        process.start()
    for _, theirs in ends:
        theirs.close()  # so that a rank that dies is noticed
    answers = [ours.recv() for ours, _ in ends]
    for process in ranks:
        process.join()
    return {
        name: {
            who: {key: max(answer[name][who][key] for answer in answers) for key in ("seconds", "bytes")}
            for who in ("ours", "peer")
        }
        for name in OBJECTIVE_NAMES
    }


def rows_of(found: dict[str, Any], world: int, pairs: int) -> list[Row]:
    """The table's lines for one number of ranks."""
    made = []
    for name, each in found.items():
        for key, unit, factor in (("bytes", "MB", 1e-6), ("seconds", "ms", 1e3)):
            ours, peer = each["ours"][key] * factor, each["peer"][key] * factor
            kind = "memory" if key == "bytes" else "time"
            work = f"loss {kind} {name} {world} x {pairs}"
            made.append(smaller(work, ours, peer, unit, digits=2))
    return made


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer pairs and repeats, under 50 s on 2 cores")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    if options.device == "cuda":
        cases = [(1, 8192)] if options.quick else [(1, 4096), (1, 16384), (1, 32768)]
        repeats = 5 if options.quick else 20
    else:
        pairs, repeats = (512, 3) if options.quick else (2048, 7)
        cases = [(world, pairs) for world in (1, 2, 4, 8)]
    table = []
    print_header(WORK_WIDTH, peer="open_clip", note="   (ranks x pairs on each)")
    for world, pairs in cases:
        for row in rows_of(run_world(world, pairs, repeats, options.device), world, pairs):
            table.append(row)
            print_row(row, WORK_WIDTH)
    write_rows(options.json, table)


if __name__ == "__main__":
    main()
