"""What each part brings: objectives, optimisers and options against plain InfoNCE, by what is learnt and its cost.

    python benchmarks/learning.py [--quick] [--json PATH] [--seeds 0 1 2] [--output FOLDER] [--arms NAME ...]
                                  [--dry-run] [--report-only]

The model and the trainer of configs/dfn.yaml (300 steps of 128 pairs; captions up to 77 tokens) on the data of
configs/demo.yaml: the filtered sample pool and scenes composed of its pictures. An arm is what its overrides change.
Measured on pictures of a style that is never trained on (zero-shot names; retrieval among 500 scenes), and of the
trained style. Every seed gives other weights, another order and other scenes. Tables: each arm's mean over the seeds,
least and greatest beside it, and by how many points it is above the baseline, seed by seed.

What a step costs is the median over the steps of a training, in processor seconds of the process (all threads; what
other processes do, or a pause, does not count) and in seconds by the clock (which it does). The learning rate of
each optimiser, the baseline's too, is the best of three in trainings of 150 steps with seed 3, which is not in the
table, by what is learnt of the trained style; weight decay is such that rate x decay is the same for all.

Started again, a run goes on. --report-only prints what is there, with the number of seeds; --dry-run what is to be done
and a guess at its cost. About an hour on 2 quiet cores; --quick (one seed, few steps, one optimiser beside the
baseline's) shows only that it runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is there: a thread that waits is to cost nothing

import torch.nn.functional as F
from learning_arms import ARMS, ARMS_BY_NAME, BASE, BASE_OPTIMIZER, CONTEXT, RATES, SOUP, Arm, search_arm
from study import PICTURES, POOL, ROOT, Numbers, Results, Study, arguments, gain_rows, gains, metrics_of, table
from tables import Row, smaller, write_rows
from torch import Tensor

from mmfoundry.models import text
from mmfoundry.models.clip import CLIP
from mmfoundry.models.io import load_clip, save_clip
from mmfoundry.pipeline.config import load_yaml
from mmfoundry.pipeline.metrics import METRICS_FILE, StageLog, read_metrics
from mmfoundry.pipeline.stage import Stage

RECIPES = [ROOT / "configs" / name for name in ("demo.yaml", "dfn.yaml")]
METRICS = {
    "zeroshot_names_top1": "names, other style, top 1",
    "zeroshot_names_top5": "names, other style, top 5",
    "other_image_to_text_r5": "image to text, other style, R@5",
    "other_text_to_image_r5": "text to image, other style, R@5",
    "zeroshot_names_noto_top1": "names, trained style, top 1",
    "image_to_text_r1": "image to text, trained style, R@1",
    "text_to_image_r1": "text to image, trained style, R@1",
}
CHOSEN_BY = ("zeroshot_names_noto_top1", "image_to_text_r1", "text_to_image_r1")  # of the trained style only
SEARCH_SEED, DECAY = 3, 1.5e-4  # DECAY: rate x weight decay
FULL_STEPS, QUICK_STEPS = 300, 2
QUICK_ARMS = [arm.name for arm in ARMS if arm.optimizer in (BASE_OPTIMIZER, "lion")]
GUESS_S = {"step": 0.35, "rest": 15.0}  # processor seconds: a step of the baseline; start and evaluation of a training


class Clocked(StageLog):
    """Writes beside each step's numbers what this process's clocks say."""

    def scalars(
        self, step: int, values: Mapping[str, float | int], phase: str = "train", tensorboard: bool = True
    ) -> None:
        """Write one line of numbers."""
        clocks = {"clock/cpu_s": time.process_time(), "clock/wall_s": time.monotonic()}
        super().scalars(step, {**values, **clocks}, phase, tensorboard)


def step_cost(training: Path) -> Numbers:
    """Median seconds of a step, of the processor and by the clock."""
    lines = list(read_metrics(training / METRICS_FILE))
    cost = {}
    for clock in ("cpu_s", "wall_s"):
        ticks = [line[f"clock/{clock}"] for line in lines]
        cost[clock] = statistics.median(after - before for before, after in pairwise(ticks))
    return cost


@contextmanager
def padded_captions(length: int) -> Iterator[None]:
    """Text towers cut nothing off; there is no option for that, as nothing is gained by it."""

    def pad(tokens_bL: Tensor) -> Tensor:
        return F.pad(tokens_bL, (0, length - tokens_bL.shape[1]))

    before, text.trim = text.trim, pad
    try:
        yield
    finally:
        text.trim = before


def cut_embeddings(folder: Path, width: int, target: Path) -> None:
    """Write a model whose embeddings are the first numbers of another's."""
    model = load_clip(folder)
    projections = ("visual_projection.weight", "text_projection.weight")
    state = {name: value[:width] if name in projections else value for name, value in model.state_dict().items()}
    config = model.config.model_copy(update={"embed_dim": width})
    save_clip(CLIP(config), target, state=state)


class Learning(Study):
    """The arms' trainings and evaluations."""

    def __init__(self, output: Path, quick: bool):
        demo, dfn = map(load_yaml, RECIPES)
        sets = {name: demo["scenes"]["sets"][name] for name in ("singles", "clip", "retrieval")}
        sets["other"] = sets["retrieval"] | {"styles": ["twemoji"]}
        sets["held_out"] = sets["clip"] | {"count": 512}
        dfn["before"]["model"]["text_cfg"]["context_length"] = CONTEXT
        tasks = {"other": {"task": "retrieval", "scenes": {"data": "other"}, "prefix": "other_"}}
        recipe = {
            "filter": demo["filter"],
            "scenes": demo["scenes"] | {"sets": sets},
            "train": dfn["before"],
            "eval": dfn["eval_before"] | {"only": ["zeroshot_names", "zeroshot_names_noto", "retrieval", *tasks]},
        }
        recipe["eval"] |= {"tasks": tasks}
        super().__init__(output, recipe, " and ".join(map(str, RECIPES)), QUICK_STEPS if quick else None)
        self.rates: dict[str, float] = {}

    def stage(self, entry: str) -> Stage:
        """The stage of an entry; a training with clocks in its log."""
        stage = super().stage(entry)
        if entry != "train":
            return stage

        def run(config: Any, context: Any) -> Any:
            context.log = Clocked(context.work, context.runtime.is_main)  # a cached property: what it is from now on
            return stage.run(config, context)

        return replace(stage, run=run)

    def rate(self, optimizer: str) -> float:
        """The best learning rate of an optimiser; what is missing of the search for it is done first."""
        if self.quick_steps:
            return RATES[optimizer][1]
        if optimizer not in self.rates:
            for rate in RATES[optimizer]:
                self.measure(search_arm(optimizer, rate), SEARCH_SEED)
            self.rates[optimizer] = best_rate(search_scores(self.output)[optimizer])
        return self.rates[optimizer]

    def measure(self, arm: Arm, seed: int) -> None:
        """Train, if the arm has a training of its own, and evaluate."""
        scenes = self.run("scenes", seed, "scenes", pictures=PICTURES)
        training = self.folder(seed, f"train-{ARMS_BY_NAME[arm.of].place if arm.of else arm.place}")
        if not arm.of:
            self.train(arm, seed, training, scenes)
        model = training / arm.model
        if arm.width:
            model = self.folder(seed, f"cut-{arm.place}")
            if not model.is_dir():
                cut_embeddings(training, arm.width, model)
        sets = {"scenes": "retrieval", "questions": "retrieval", "other": "other"}
        data = {"pictures": PICTURES} | {name: str(scenes / folder) for name, folder in sets.items()}
        self.run("eval", seed, f"eval-{arm.place}", clip=str(model), data=data)

    def train(self, arm: Arm, seed: int, folder: Path, scenes: Path) -> None:
        """The training of an arm."""
        rate = arm.rate or self.rate(arm.optimizer)
        overrides = ["trainer.save_steps=0"]
        if arm.optimizer != BASE_OPTIMIZER:
            overrides.append(f"trainer.optimizer={{type: {arm.optimizer}}}")
        overrides += [f"trainer.optimizer.lr={rate}", f"trainer.optimizer.weight_decay={DECAY / rate}"]
        if arm.steps:
            overrides.append(f"trainer.max_steps={arm.steps}")
        overrides += arm.overrides
        if self.quick_steps and set(SOUP) <= set(overrides):
            overrides += ["trainer.save_steps=1", f"soup.checkpoints={self.quick_steps}"]
        places = {"BASELINE": self.folder(seed, f"train-{BASE}"), "HELD_OUT": scenes / "held_out"}
        for name, path in places.items():
            overrides = [override.replace(name, str(path)) for override in overrides]
        filtered = self.run("filter", seed, "filter", pool=POOL)
        sources = {filtered / "shards": 1, scenes / "singles": 1, scenes / "clip": 2}
        data = [{"path": str(path), "weight": weight} for path, weight in sources.items()]
        with padded_captions(CONTEXT) if arm.padded else nullcontext():
            self.run("train", seed, folder.name, overrides, data=data)


@dataclass(frozen=True)
class Found:
    """What there is in a folder of runs: metrics and costs of a step, arm -> seed -> numbers."""

    results: Results
    costs: Results

    @classmethod
    def of(cls, output: Path, seeds: Sequence[int], arms: Sequence[Arm]) -> Found:
        """Read it."""
        results: Results = {}
        costs: Results = {}
        for arm, seed in ((arm, seed) for arm in arms for seed in seeds):
            metrics = metrics_of(output / f"seed-{seed}" / f"eval-{arm.place}")
            if metrics is None:
                continue
            results.setdefault(arm.name, {})[seed] = {name: metrics[name] for name in METRICS}
            if not arm.of:
                costs.setdefault(arm.name, {})[seed] = step_cost(output / f"seed-{seed}" / f"train-{arm.place}")
        return cls(results, costs)

    def mean_cost(self, arm: str, clock: str) -> float | None:
        """Mean over the seeds of a step's seconds; None of an arm that is a by-product of another's training."""
        return statistics.mean(cost[clock] for cost in self.costs[arm].values()) if arm in self.costs else None

    def tables(self) -> str:
        """Both tables."""
        seeds = {arm: str(len(runs)) for arm, runs in self.results.items()}
        more = {"seeds": seeds}
        for clock, head in (("cpu_s", "CPU s a step"), ("wall_s", "s a step")):
            costs = {arm: self.mean_cost(arm, clock) for arm in self.results}
            more[head] = {arm: "" if cost is None else f"{cost:.3f}" for arm, cost in costs.items()}
        return f"{table(self.results, METRICS, more)}\n\n{gains(self.results, BASE, METRICS)}"

    def rows(self) -> list[Row]:
        """Machine-readable."""
        made = gain_rows(self.results, BASE, list(METRICS))
        peer = self.mean_cost(BASE, "cpu_s")
        for arm in self.costs if peer else ():
            ours = self.mean_cost(arm, "cpu_s")
            if arm != BASE and ours and peer:
                made.append(smaller(f"{arm}: step", ours, peer, "CPU s", digits=4))
        return made


def search_scores(output: Path) -> dict[str, dict[float, float]]:
    """What the search for learning rates has found so far: optimiser -> rate -> mean of `CHOSEN_BY`."""
    scores: dict[str, dict[float, float]] = {}
    for name, rate in ((name, rate) for name, rates in RATES.items() for rate in rates):
        metrics = metrics_of(output / f"seed-{SEARCH_SEED}" / f"eval-{search_arm(name, rate).place}")
        if metrics is not None:
            scores.setdefault(name, {})[rate] = statistics.mean(metrics[each] for each in CHOSEN_BY)
    return scores


def best_rate(scores: Mapping[float, float]) -> float:
    """The rate with the highest score; of equals the lowest rate."""
    return max(sorted(scores), key=lambda rate: scores[rate])


def search_lines(output: Path) -> str:
    """What the search has found, a line an optimiser; the rate that is taken is marked."""
    lines = []
    for name, scores in search_scores(output).items():
        best = best_rate(scores) if len(scores) == len(RATES[name]) else None
        told = [f"{rate:g}{'*' if rate == best else ''}: {100 * score:.1f}" for rate, score in scores.items()]
        lines.append(f"{name}: {', '.join(told)}")
    return "\n".join(["learning rates (* taken), mean of the trained style's metrics after the search:", *lines])


def plan(output: Path, seeds: Sequence[int], arms: Sequence[Arm], quick: bool) -> str:
    """What is to be done, and a guess at its cost."""
    wanted = [(seed, arm) for seed in seeds for arm in arms]
    optimizers = dict.fromkeys(arm.optimizer for arm in arms if not quick)
    wanted += [(SEARCH_SEED, search_arm(name, rate)) for name in optimizers for rate in RATES[name]]
    left = [(seed, arm) for seed, arm in wanted if metrics_of(output / f"seed-{seed}" / f"eval-{arm.place}") is None]
    steps = sum(QUICK_STEPS if quick else arm.steps or FULL_STEPS for _, arm in left if not arm.of)
    seconds = GUESS_S["step"] * steps + GUESS_S["rest"] * len(left)
    trainings = sum(not arm.of for _, arm in left)
    return f"{trainings} trainings, {steps} steps, {len(left)} evaluations: about {seconds / 60:.0f} processor minutes"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS_BY_NAME), metavar="NAME", help="which, beside the baseline; default: all"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what is to be done, and what it will cost")
    parser.add_argument("--report-only", action="store_true", help="print the tables of what is there")
    options = parser.parse_args()
    if options.report_only and options.output is None:
        parser.error("--report-only wants --output")
    return options


def main() -> None:
    """Run the study and print its tables."""
    options = parse_arguments()
    names = {BASE, *(options.arms or (QUICK_ARMS if options.quick else ARMS_BY_NAME))}
    names |= {ARMS_BY_NAME[name].of for name in names}
    arms = [arm for arm in ARMS if arm.name in names]
    seeds = options.seeds[:1] if options.quick else options.seeds
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        output = options.output or Path(temporary)
        print(plan(output, seeds, arms, options.quick), flush=True)
        if options.dry_run:
            return
        if not options.report_only:
            study = Learning(output, options.quick)
            for seed in seeds:
                for arm in arms:
                    study.measure(arm, seed)
                if seed != seeds[-1]:
                    print(f"\n{Found.of(output, seeds, arms).tables()}", flush=True)
        found, searched = Found.of(output, seeds, arms), search_lines(output)
    print(f"\n{found.tables()}\n\n{searched}\n\n{time.monotonic() - started:.0f} s")
    write_rows(options.json, found.rows())


if __name__ == "__main__":
    main()
