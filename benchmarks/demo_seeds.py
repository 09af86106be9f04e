"""The demo's numbers over several runs, as one table: median, least and greatest, and the bars that they are held to.

    for seed in 0 1 2; do mmfoundry run configs/demo.yaml seed=$seed --output runs/demo-$seed; done
    python benchmarks/demo_seeds.py runs/demo-*/summary.json

A bar holds if the median of the runs reaches it. Shares are in percent.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

# metric -> the least median that counts as reached, or None where no bar was set
BARS: dict[str, float | None] = {
    "filter/bad_dropped": 0.9,
    "filter/good_dropped": None,
    "eval/image_to_text_r1": None,
    "eval/image_to_text_r5": 0.6,
    "eval/image_to_text_r10": None,
    "eval/text_to_image_r1": None,
    "eval/text_to_image_r5": None,
    "eval/text_to_image_r10": None,
    "eval/zeroshot_names_noto_top1": None,
    "eval/zeroshot_names_noto_top5": None,
    "eval/zeroshot_names_top1": None,
    "eval/zeroshot_names_top5": 8 * 5 / 306,  # eight times chance
    "eval/zeroshot_category_heldout": None,
    "eval/linear_probe": None,
    "eval/hard_negatives_replace": None,
    "eval/hard_negatives_swap": None,
    "eval/hard_negatives_place": None,
    "eval/hard_negatives_count": None,
    "eval/vqa_count": 0.85,
    "eval/vqa_where": 0.8,
    "eval/vqa_presence": 0.8,
    "eval/vqa_what": 0.6,
    "eval/pope_f1": None,
    "adapt/clip_before": None,
    "adapt/clip_linear_probe": None,
    "adapt/clip_after": None,
    "adapt/clip_gain_low": 0.0,  # the adapter beats zero-shot outside the interval
    "adapt/clip_old_before": None,
    "adapt/clip_old_after": None,
    "adapt/vlm_before": None,
    "adapt/vlm_after": None,
    "adapt/vlm_gain_low": 0.0,
}
OLD_TYPES = ("what", "count", "where", "presence")
MAX_LOSS = 0.05  # of accuracy on an old question type, by the adapter for a new one


def read_summaries(paths: Sequence[Path]) -> list[dict[str, float]]:
    """The runs' summaries, with the change of each old question type among their metrics."""
    runs = []
    for path in paths:
        run: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        for kind in OLD_TYPES:
            run[f"adapt/vlm_{kind}_change"] = run[f"adapt/vlm_{kind}_after"] - run[f"adapt/vlm_{kind}_before"]
        run["seconds"] = sum(value for name, value in run.items() if name.endswith("/seconds"))
        runs.append(run)
    return runs


def table(runs: Sequence[dict[str, float]]) -> str:
    """The runs as a Markdown table, one metric a row."""
    bars = BARS | {f"adapt/vlm_{kind}_change": -MAX_LOSS for kind in OLD_TYPES}
    lines = ["| metric | median | least | greatest | best constant | bar | reached |", "| --- " * 7 + "|"]
    for name, bar in bars.items():
        values = [run[name] for run in runs]
        middle = statistics.median(values)
        constants = [run.get(f"{name}_constant", math.nan) for run in runs]
        constant = "" if math.isnan(constants[0]) else f"{100 * statistics.median(constants):.1f}"
        limit, reached = ("", "") if bar is None else (f"{100 * bar:.1f}", "yes" if middle >= bar else "NO")
        row = [name, f"{100 * middle:.1f}", f"{100 * min(values):.1f}", f"{100 * max(values):.1f}"]
        lines.append("| " + " | ".join([*row, constant, limit, reached]) + " |")
    seconds = [run["seconds"] for run in runs]
    lines += ["", "Seconds in the stages: " + ", ".join(f"{value:.0f}" for value in seconds)]
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summaries", nargs="+", type=Path, help="summary.json of each run")
    print(table(read_summaries(parser.parse_args().summaries)))


if __name__ == "__main__":
    main()
