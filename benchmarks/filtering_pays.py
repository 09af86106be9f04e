"""Does filtering pay? One CLIP config, trained for the same samples seen on what different filters leave of a pool.

    python benchmarks/filtering_pays.py [--quick] [--json PATH] [--seeds 0 1 2] [--output FOLDER]

Arms: everything (what cannot be read is skipped), DataComp's basic rules, all rules that need no model, and these
followed by a data filtering network. Models, steps, network and measurements are those of configs/dfn.yaml; every seed
gives other weights, another order and, for the filter network, another network. The table has each arm's mean over
the seeds, least and greatest beside it, and by how many points it is above everything, seed by seed. Started again, a
run that was cut off goes on. About 25 minutes on 2 quiet cores; --quick (one seed, few steps) shows only that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfoundry.data.filters.subset import read_subset
from mmfoundry.launch.catalog import Stages
from mmfoundry.pipeline.config import load_yaml, parse
from mmfoundry.pipeline.distributed import init_runtime
from mmfoundry.pipeline.stage import run_stage

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "dfn.yaml"
POOL = str(ROOT / "data" / "samples" / "pool-*.tar")
METRICS = {
    "zeroshot_names_noto_top1": "zero-shot names, same style, top 1",
    "zeroshot_names_top1": "zero-shot names, other style, top 1",
    "zeroshot_names_top5": "zero-shot names, other style, top 5",
    "image_to_text_r1": "image to text, recall at 1",
    "text_to_image_r1": "text to image, recall at 1",
}
QUICK_STEPS, QUICK_SCENES = 4, 60


@dataclass(frozen=True)
class Arm:
    """What is trained on.

    Attributes:
        name: in the table.
        pairs: samples that are left of the pool.
        shards: where they are.
    """

    name: str
    pairs: int
    shards: str


class Study:
    """The recipe's sections, run for one seed after the other."""

    def __init__(self, output: Path, quick: bool):
        self.output, self.quick = output, quick
        self.recipe = load_yaml(RECIPE)
        self.runtime = init_runtime()
        self.stages = Stages()

    def run(self, entry: str, seed: int, name: str, **changes: Any) -> Path:
        """Run a section of the recipe, changed, and return its folder; one that was finished is left as it is."""
        tree: dict[str, Any] = {key: value for key, value in self.recipe[entry].items() if key != "stage"}
        stage = self.stages[self.recipe[entry].get("stage", entry)]
        tree |= changes | {"seed": seed}
        if self.quick and "trainer" in tree:
            tree["trainer"] = tree["trainer"] | {"max_steps": QUICK_STEPS, "scheduler": {"type": "constant"}}
        if self.quick and "sets" in tree:
            tree["sets"] = {key: value | {"count": QUICK_SCENES} for key, value in tree["sets"].items()}
        folder = self.output / f"seed-{seed}" / name
        run_stage(stage, parse(stage.config_type, tree, RECIPE, entry), folder, self.runtime)
        return folder

    def arms(self, seed: int, scenes: Path) -> list[Arm]:
        """What each filter leaves of the pool."""
        rules = self.recipe["curated"]["filters"]["all"]
        network = self.run("network", seed, "network", data=[{"path": str(scenes / "clean")}])
        scorers = {"dfn": self.recipe["curated"]["scorers"]["dfn"] | {"model": str(network)}}
        chosen: dict[str, tuple[Any, Any]] = {
            "basic": ([rule for rule in rules if "basic" in rule], {}),
            "rules": ([rule for rule in rules if "clip_score" not in rule], {}),
            "rules, then DFN": (rules, scorers),
        }
        arms = [Arm("everything", 852, POOL)]
        for name, (filters, models) in chosen.items():
            place = f"filter-{name.replace(', ', '-').replace(' ', '-')}"
            folder = self.run("curated", seed, place, pool=POOL, filters={"all": filters}, scorers=models)
            arms.append(Arm(name, len(read_subset(folder / "subset.npy")), str(folder / "shards")))
        return arms

    def measure(self, arm: Arm, seed: int, scenes: Path) -> dict[str, float]:
        """Train on an arm and evaluate."""
        place = arm.name.replace(", ", "-").replace(" ", "-")
        model = self.run("before", seed, f"train-{place}", data=[{"path": arm.shards}])
        retrieval = str(scenes / "retrieval")
        data = {
            "pictures": str(ROOT / "data" / "samples" / "pictures-*.tar"),
            "scenes": retrieval,
            "questions": retrieval,
        }
        evaluated = self.run("eval_before", seed, f"eval-{place}", clip=str(model), data=data)
        metrics = json.loads((evaluated / "manifest.json").read_text(encoding="utf-8"))["metrics"]
        return {name: metrics[name] for name in METRICS}


def study(
    output: Path, seeds: Sequence[int], quick: bool
) -> tuple[dict[str, list[int]], dict[str, list[dict[str, float]]]]:
    """Pairs and metrics of every arm, by seed."""
    study = Study(output, quick)
    pictures = str(ROOT / "data" / "samples" / "pictures-*.tar")
    pairs: dict[str, list[int]] = {}
    results: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        scenes = study.run("scenes", seed, "scenes", pictures=pictures)
        for arm in study.arms(seed, scenes):
            pairs.setdefault(arm.name, []).append(arm.pairs)
            results.setdefault(arm.name, []).append(study.measure(arm, seed, scenes))
    return pairs, results


def table(pairs: dict[str, list[int]], results: dict[str, list[dict[str, float]]]) -> str:
    """A row an arm: pairs kept, and each metric as mean (least to greatest), percent."""
    lines = ["| arm | pairs | " + " | ".join(METRICS.values()) + " |", "| --- | --- " + "| --- " * len(METRICS) + "|"]
    for arm, runs in results.items():
        cells = [arm, str(round(statistics.mean(pairs[arm])))]
        for metric in METRICS:
            values = [100 * run[metric] for run in runs]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gains(results: dict[str, list[dict[str, float]]]) -> str:
    """By how many points each arm is above everything: the mean over seeds, and each seed's own."""
    lines = ["| above everything, points | " + " | ".join(METRICS.values()) + " |", "| --- " * (len(METRICS) + 1) + "|"]
    for arm, runs in results.items():
        if arm == "everything":
            continue
        cells = [arm]
        for metric in METRICS:
            above = [100 * (run[metric] - base[metric]) for run, base in zip(runs, results["everything"], strict=True)]
            cells.append(f"{statistics.mean(above):+.1f} ({', '.join(f'{value:+.1f}' for value in above)})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rows(results: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Machine-readable: each arm and metric against everything; ratio > 1 means that filtering paid."""
    made = []
    for arm, runs in results.items():
        for metric in METRICS if arm != "everything" else ():
            ours, peer = (statistics.mean(run[metric] for run in each) for each in (runs, results["everything"]))
            ratio = ours / peer if peer else None
            made.append({"work": f"{arm}: {metric}", "ours": ours, "peer": peer, "unit": "share", "ratio": ratio})
    return made


def main() -> None:
    """Run the study and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: shows that it runs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows as JSON")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="folder of the runs, to go on from; by default a temporary one")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        output = options.output or Path(temporary)
        seeds = options.seeds[:1] if options.quick else options.seeds
        pairs, results = study(output, seeds, options.quick)
    print(f"\n{table(pairs, results)}\n\n{gains(results)}\n\n{len(seeds)} seeds, {time.monotonic() - started:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(rows(results), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
