"""Result tables and examples, as the eval and adapt stages write them, for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmfoundry.pipeline.report_parts.charts import Mark, whisker, whisker_legend
from mmfoundry.pipeline.report_parts.html import Child, Markup, facts, percent, picture, tag

LONG = 17  # characters; longer text needs the card's whole width
BASELINES = ("chance", "untrained", "constant")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def above_baselines(row: Mapping[str, Any]) -> bool | None:
    """Whether the whole interval lies above every baseline; None for a number of which more is not better."""
    if row.get("chance") is None and row.get("constant") is None:
        return None
    return row["low"] > max(row[name] for name in BASELINES if row.get(name) is not None)


def results_table(rows: list[dict[str, Any]], about: Mapping[str, str]) -> Markup:
    """Rows as dot and whiskers with their baselines, grouped by task.

    Args:
        rows: as in `results.json`.
        about: task to one line on what it measures.
    """
    body: list[Markup] = []
    task = None
    for row in rows:
        if row["task"] != task:
            task = row["task"]
            cell = tag("td", task.replace("_", " "), tag("span", about.get(task, "")), colspan=7)
            body.append(tag("tr", cell, class_="head"))
        if row.get("unit", "share") != "share":
            body.append(_plain_row(row))
            continue
        marks = [Mark(name, row.get(name)) for name in BASELINES]
        chart = whisker(row["value"], row["low"], row["high"], marks, above_baselines(row))
        interval = f"{100 * row['low']:.1f}–{100 * row['high']:.1f}"
        cells: list[Child] = [tag("code", row["metric"]), chart, tag("b", percent(row["value"])), interval]
        cells += [percent(row.get(name)) for name in BASELINES]
        body.append(tag("tr", [tag("td", cell, class_="num" if i >= 2 else None) for i, cell in enumerate(cells)]))
    head = ["metric", "0 to 100%", "value", "95% interval", "chance", "untrained", "constant"]
    whole = tag("table", tag("thead", tag("tr", [tag("th", each) for each in head])), tag("tbody", body))
    return whisker_legend() + tag("div", whole, class_="scroll")


def _plain_row(row: Mapping[str, Any]) -> Markup:
    """A number that is no share of 1: without a chart."""
    values = [row["value"], None, *(row.get(name) for name in BASELINES)]
    shown: list[Child] = ["–" if value is None else f"{value:.4f}" for value in values]
    shown[1] = f"{row['low']:.4f}–{row['high']:.4f}"
    cells: list[Child] = [tag("code", row["metric"]), row["unit"], tag("b", shown[0]), *shown[1:]]
    return tag("tr", [tag("td", cell, class_="num" if i >= 2 else None) for i, cell in enumerate(cells)])


def read_examples(folder: Path) -> list[dict[str, Any]]:
    """Examples with their pictures as bytes; none where the folder is not there."""
    file = folder / "examples.json"
    if not file.is_file():
        return []
    entries = json.loads(file.read_text(encoding="utf-8"))
    return [entry | {"pictures": [(folder / name).read_bytes() for name in entry["pictures"]]} for entry in entries]


def example_cells(examples: list[dict[str, Any]], wide: bool = False) -> Markup:
    """Examples as cards: pictures, then what was asked and answered; right ones green, wrong ones red at the left."""
    cells = []
    for example in examples:
        alt = next((value for value in example["fields"].values() if isinstance(value, str)), "")
        said = facts({key: _value(value) for key, value in example["fields"].items()}, LONG)
        verdict = tag("span", "✓ right" if example["right"] else "✗ wrong", class_="yes" if example["right"] else "no")
        side = "cell right" if example["right"] else "cell wrong"
        if len(example["pictures"]) > 1:
            marked = example["marked"] or [False] * len(example["pictures"])
            strip = [
                picture(data, alt, "pic hit" if hit else "pic")
                for data, hit in zip(example["pictures"], marked, strict=True)
            ]
            cells.append(tag("div", tag("div", strip, class_="strip"), verdict, said, class_=side))
        elif wide:
            right = tag("div", verdict, said)
            cells.append(tag("div", picture(example["pictures"][0], alt), right, class_=f"{side} side"))
        else:
            cells.append(tag("div", picture(example["pictures"][0], alt), verdict, said, class_=side))
    several = any(len(example["pictures"]) > 1 for example in examples)
    return tag("div", cells, class_="grid half" if several else "grid wide" if wide else "grid")


def _value(value: str | list[str]) -> Child:
    if isinstance(value, str) or len(value) == 1:
        value = value if isinstance(value, str) else value[0]
        return value or tag("span", "(nothing)", class_="soft")
    return tag("ol", [tag("li", item) for item in value])
