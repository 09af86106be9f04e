"""What studies of learning share: sections of recipes run for one seed after the other, and tables over the seeds."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import Row

from mmfoundry.launch.catalog import Stages
from mmfoundry.pipeline.artifact import MANIFEST
from mmfoundry.pipeline.config import apply_overrides, parse
from mmfoundry.pipeline.distributed import init_runtime
from mmfoundry.pipeline.stage import Stage, run_stage

ROOT = Path(__file__).resolve().parents[1]
PICTURES = str(ROOT / "data" / "samples" / "pictures-*.tar")
POOL = str(ROOT / "data" / "samples" / "pool-*.tar")
QUICK_SCENES = 60

Numbers = Mapping[str, float]
Results = dict[str, dict[int, Numbers]]  # arm -> seed -> metric -> number


class Study:
    """Sections of a recipe, run for one seed after the other into `<output>/seed-<seed>/<name>`.

    Args:
        output: folder of the runs. What was finished there by an earlier run of the same config is left as it is.
        recipe: entry -> its section, as in a recipe.
        source: the recipe's file or files, named in errors.
        quick_steps: of each training, on sets of few scenes, which shows only that it runs; None: as the recipe says.
    """

    def __init__(self, output: Path, recipe: Mapping[str, Any], source: str | Path, quick_steps: int | None = None):
        self.output, self.recipe, self.source, self.quick_steps = output, recipe, source, quick_steps
        self.runtime = init_runtime()
        self.stages = Stages()

    def folder(self, seed: int, name: str) -> Path:
        """Where a section of that seed goes."""
        return self.output / f"seed-{seed}" / name

    def stage(self, entry: str) -> Stage:
        """The stage of an entry."""
        return self.stages[self.recipe[entry].get("stage", entry)]

    def run(self, entry: str, seed: int, name: str, overrides: Iterable[str] = (), **changes: Any) -> Path:
        """Run a section of the recipe and return its folder.

        Args:
            entry: of the recipe.
            seed: of the section.
            name: of its folder.
            overrides: `dotted.key=value`, as on the command line.
            changes: keys of the section and their values, put in before the overrides.
        """
        tree: dict[str, Any] = {key: value for key, value in self.recipe[entry].items() if key != "stage"}
        tree = apply_overrides(tree | changes | {"seed": seed}, overrides)
        if self.quick_steps and "trainer" in tree:
            tree["trainer"] |= {"max_steps": self.quick_steps, "scheduler": {"type": "constant"}}
        if self.quick_steps and "sets" in tree:
            tree["sets"] = {key: value | {"count": QUICK_SCENES} for key, value in tree["sets"].items()}
        stage, folder = self.stage(entry), self.folder(seed, name)
        run_stage(stage, parse(stage.config_type, tree, self.source, entry), folder, self.runtime)
        return folder


def metrics_of(folder: Path) -> dict[str, float] | None:
    """The metrics of a finished section; None where it is not finished."""
    manifest = folder / MANIFEST
    return json.loads(manifest.read_text(encoding="utf-8"))["metrics"] if manifest.is_file() else None


def table(results: Results, metrics: Mapping[str, str], more: Mapping[str, Mapping[str, str]]) -> str:
    """A row an arm: cells of `more`, and each metric as mean (least to greatest) over the seeds, in percent.

    Args:
        results: of each arm, shares of 1.
        metrics: keys of the results and the columns' heads.
        more: heads of columns that come first, and arm -> cell.
    """
    lines = [_line(["arm", *more, *metrics.values()]), "| --- " * (1 + len(more) + len(metrics)) + "|"]
    for arm, runs in results.items():
        cells = [arm, *(column.get(arm, "") for column in more.values())]
        for metric in metrics:
            values = [100 * run[metric] for run in runs.values()]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(_line(cells))
    return "\n".join(lines)


def gains(results: Results, base: str, metrics: Mapping[str, str]) -> str:
    """By how many points each arm is above the arm `base`: the mean over seeds that both have, and each seed's own."""
    lines = [_line([f"above {base}, points", *metrics.values()]), "| --- " * (len(metrics) + 1) + "|"]
    for arm, runs in results.items():
        common = [seed for seed in runs if seed in results.get(base, {})]
        if arm == base or not common:
            continue
        cells = [arm]
        for metric in metrics:
            above = [100 * (runs[seed][metric] - results[base][seed][metric]) for seed in common]
            cells.append(f"{statistics.mean(above):+.1f} ({', '.join(f'{value:+.1f}' for value in above)})")
        lines.append(_line(cells))
    return "\n".join(lines)


def gain_rows(results: Results, base: str, metrics: Sequence[str]) -> list[Row]:
    """Machine-readable: each arm and metric, a share of 1, against the arm `base`; means over their common seeds."""
    made: list[Row] = []
    for arm, runs in results.items():
        common = [seed for seed in runs if seed in results.get(base, {})]
        for metric in metrics if arm != base and common else ():
            ours, peer = (statistics.mean(results[each][seed][metric] for seed in common) for each in (arm, base))
            ratio = ours / peer if peer else None
            made.append({"work": f"{arm}: {metric}", "ours": ours, "peer": peer, "unit": "share", "ratio": ratio})
    return made


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every study is told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: shows that it runs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows as JSON")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="folder of the runs, to go on from; by default a temporary one")
    return parser
