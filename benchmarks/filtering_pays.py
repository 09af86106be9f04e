"""Does filtering pay? One CLIP config, trained for the same samples seen on what different filters leave of a pool.

    python benchmarks/filtering_pays.py [--quick] [--json PATH] [--seeds 0 1 2] [--output FOLDER]

Arms: everything (what cannot be read is skipped), DataComp's basic rules, all rules that need no model, and these
followed by a data filtering network. Models, steps, network and measurements are those of configs/dfn.yaml; every seed
gives other weights, another order and, for the filter network, another network. The table has each arm's mean over
the seeds, least and greatest beside it, and by how many points it is above everything, seed by seed. Started again, a
run that was cut off goes on. About 25 minutes on 2 quiet cores; --quick (one seed, few steps) shows only that it runs.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study import PICTURES, POOL, ROOT, Numbers, Results, Study, arguments, gain_rows, gains, metrics_of, table
from tables import write_rows

from mmfoundry.data.filters.subset import read_subset
from mmfoundry.pipeline.config import load_yaml

RECIPE = ROOT / "configs" / "dfn.yaml"
BASE = "everything"
METRICS = {
    "zeroshot_names_noto_top1": "zero-shot names, same style, top 1",
    "zeroshot_names_top1": "zero-shot names, other style, top 1",
    "zeroshot_names_top5": "zero-shot names, other style, top 5",
    "image_to_text_r1": "image to text, recall at 1",
    "text_to_image_r1": "text to image, recall at 1",
}
QUICK_STEPS = 4


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


class FilterStudy(Study):
    """The arms of one seed, and what they are measured by."""

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
        arms = [Arm(BASE, 852, POOL)]
        for name, (filters, models) in chosen.items():
            place = f"filter-{name.replace(', ', '-').replace(' ', '-')}"
            folder = self.run("curated", seed, place, pool=POOL, filters={"all": filters}, scorers=models)
            arms.append(Arm(name, len(read_subset(folder / "subset.npy")), str(folder / "shards")))
        return arms

    def measure(self, arm: Arm, seed: int, scenes: Path) -> Numbers:
        """Train on an arm and evaluate."""
        place = arm.name.replace(", ", "-").replace(" ", "-")
        model = self.run("before", seed, f"train-{place}", data=[{"path": arm.shards}])
        retrieval = str(scenes / "retrieval")
        data = {"pictures": PICTURES, "scenes": retrieval, "questions": retrieval}
        metrics = metrics_of(self.run("eval_before", seed, f"eval-{place}", clip=str(model), data=data))
        assert metrics is not None
        return {name: metrics[name] for name in METRICS}


def run(output: Path, seeds: Sequence[int], quick: bool) -> tuple[dict[str, list[int]], Results]:
    """Pairs of every arm, one number a seed, and its metrics."""
    study = FilterStudy(output, load_yaml(RECIPE), RECIPE, QUICK_STEPS if quick else None)
    pairs: dict[str, list[int]] = {}
    results: Results = {}
    for seed in seeds:
        scenes = study.run("scenes", seed, "scenes", pictures=PICTURES)
        for arm in study.arms(seed, scenes):
            pairs.setdefault(arm.name, []).append(arm.pairs)
            results.setdefault(arm.name, {})[seed] = study.measure(arm, seed, scenes)
    return pairs, results


def main() -> None:
    """Run the study and print its tables."""
    options = arguments(__doc__).parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        seeds = options.seeds[:1] if options.quick else options.seeds
        pairs, results = run(options.output or Path(temporary), seeds, options.quick)
    kept = {arm: str(round(statistics.mean(each))) for arm, each in pairs.items()}
    print(f"\n{table(results, METRICS, {'pairs': kept})}\n\n{gains(results, BASE, METRICS)}")
    print(f"\n{len(seeds)} seeds, {time.monotonic() - started:.0f} s")
    write_rows(options.json, gain_rows(results, BASE, list(METRICS)))


if __name__ == "__main__":
    main()
