"""Twenty kills at random places of random steps: does the training end as if it had never been killed?

    python -m tests.pipeline.soak_kills [--seed 0] [--kills 20] [--output FOLDER]

Two trainings share the kills. One stays on two ranks at ZeRO-1, draws dropout at every step, and must give the losses
and weights of the run that nobody killed bit for bit, on whichever rank and in whichever part of a step it was hit. The
other goes on with another number of ranks and another ZeRO stage each time, and must give those of one process up to
the rounding of sums in another order. Both must have seen each sample once. Ends with 1 where one of this is not so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from mmfoundry.pipeline.errors import MmfoundryError
from mmfoundry.pipeline.metrics import read_metrics
from mmfoundry.pipeline.ranks import start_ranks
from tests.pipeline.killed_rank import PLACES, SAVE_STEPS, WRITING
from tests.pipeline.tiny_training import trainer_config

MODULE = "tests.pipeline.killed_rank"
ROWS, STEPS = 12, 30
ELASTIC = [(2, 1), (1, 0), (4, 3), (2, 2), (4, 1), (1, 0), (2, 3), (4, 2)]  # ranks, ZeRO stage
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, thirty steps of a large learning rate


def config(stage: int, dropout: float, save_async: bool = False) -> dict[str, Any]:
    """Numbers are read a step late, but for every fourth."""
    changes = {"save_steps": SAVE_STEPS, "max_steps": STEPS, "logging_steps": 4, "save_async": save_async}
    settings = trainer_config(zero_optimization={"stage": stage}, heartbeat={"silence_timeout_s": 30}, **changes)
    return {"trainer": settings, "dropout": dropout}


def attempt(folder: Path, ranks: int, settings: dict[str, Any], number: int, kill: tuple[str, int, int] | None) -> str:
    """Start the ranks once; what they ended with."""
    arguments = [str(folder / "out"), json.dumps(settings), str(number), *(str(each) for each in kill or ())]
    with (folder / "stderr.txt").open("a") as quiet, redirect_stderr(quiet):
        try:
            start_ranks(MODULE, arguments, ranks)
        except MmfoundryError as error:
            return str(error)
    return ""


def plan(generator: random.Random, kills: int) -> list[tuple[str, int, bool]]:
    """Place, step and whether all ranks are hit, of each kill, in the order of the steps; every place comes in turn."""
    steps = sorted(generator.sample(range(3, STEPS), kills))
    places = generator.sample(PLACES * (1 + kills // len(PLACES)), kills)
    found = []
    for step, place in zip(steps, places, strict=True):
        # In a step that is not saved nothing is written.
        place = generator.choice(PLACES[:5]) if place in WRITING and step % SAVE_STEPS else place
        found.append((place, step, generator.random() < 0.4))
    return found


def one_training(folder: Path, generator: random.Random, kills: int, elastic: bool) -> list[str]:
    """Kill, go on, kill; what was not as it should be."""
    wrong: list[str] = []
    folder.mkdir(parents=True)
    dropout = 0.0 if elastic else 0.3
    for number, (place, step, all_ranks) in enumerate(plan(generator, kills)):
        ranks, stage = ELASTIC[number % len(ELASTIC)] if elastic else (2, 1)
        lost = -1 if all_ranks else 0 if place in WRITING else generator.randrange(ranks)
        before = time.monotonic()
        error = attempt(folder, ranks, config(stage, dropout, number % 3 == 1), number, (place, step, lost))
        killed = [json.loads(line) for line in (folder / "killed.jsonl").read_text().splitlines()]
        hit = sorted(rank for where, when, rank in killed if (where, when) == (place, step))
        saved = sorted(path.name for path in (folder / "out.work" / "checkpoints" / "train").glob("step-??????"))
        whom = "all" if all_ranks else f"rank {lost}"
        line = f"{ranks} rank(s) ZeRO-{stage}: {whom} killed in step {step}, {place}; left: {', '.join(saved)}"
        print(f"{line} ({time.monotonic() - before:.0f} s)", flush=True)
        if "run again to go on" not in error or not hit or (not all_ranks and hit != [lost]):
            wrong.append(f"{line}: hit {hit}, ended with {error!r}")
    ranks, stage = ELASTIC[kills % len(ELASTIC)] if elastic else (2, 1)
    error = attempt(folder, ranks, config(stage, dropout), kills, None)
    return [*wrong, error] if error else wrong


def check(folder: Path, whole: Path, exact: bool) -> list[str]:
    """What of a killed training is not that of the whole one."""
    wrong = []
    curves = [
        torch.tensor([line["loss"] for line in read_metrics(each / "out" / "metrics.jsonl") if "loss" in line])
        for each in (folder, whole)
    ]
    weights = [torch.load(each / "out" / "model.pt", weights_only=True) for each in (folder, whole)]
    apart = max(
        [0.0, *(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[1].keys() - {"calls"})]
    )
    if exact and not (torch.equal(*curves) and apart == 0.0):
        wrong.append("losses or weights are not bit for bit those of the whole run")
    if not exact and not (torch.allclose(*curves, **CLOSE) and apart < 1e-5):
        wrong.append("losses or weights are not those of the whole run")
    print(
        f"{len(curves[0])} losses, at most {(curves[0] - curves[1]).abs().max():.1e} from those of the whole run; "
        f"weights at most {apart:.1e}"
    )
    last: dict[int, tuple[int, list[str]]] = {}
    for file in folder.glob("seen-*.jsonl"):
        for number, step, keys in map(json.loads, file.read_text().splitlines()):
            kept = last.get(step, (-1, []))
            last[step] = (
                (number, keys) if number > kept[0] else (kept[0], kept[1] + keys) if number == kept[0] else kept
            )
    for step in range(1, STEPS + 1):
        if sorted(last[step][1]) != sorted(f"row-{row}" for row in range(ROWS * (step - 1), ROWS * step)):
            wrong.append(f"step {step} saw {last[step][1]}")
    print(f"{STEPS * ROWS} samples: each seen once" if len(wrong) == 0 else "\n".join(wrong))
    return wrong


def main() -> int:
    """Run, print a line a kill, and say what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--output", type=Path, help="keep the runs here")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    generator = random.Random(arguments.seed)
    folder = arguments.output or Path(tempfile.mkdtemp())
    wrong: list[str] = []
    elastic = min(len(ELASTIC), arguments.kills * 2 // 5)
    try:
        for name, kills in (("same", arguments.kills - elastic), ("elastic", elastic)):
            ranks, stage = (2, 1) if name == "same" else (1, 0)
            (folder / f"{name}-whole").mkdir(parents=True)
            settings = config(stage, 0.3 if name == "same" else 0.0)
            error = attempt(folder / f"{name}-whole", ranks, settings, 0, None)
            found = [error] if error else one_training(folder / name, generator, kills, name == "elastic")
            wrong += found or check(folder / name, folder / f"{name}-whole", exact=name == "same")
    finally:
        if arguments.output is None:
            shutil.rmtree(folder)
    print("\n".join(wrong) or f"{arguments.kills} kills, nothing lost")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
