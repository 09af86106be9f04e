"""What the report shows of a filter artifact: the funnel, what was caught and lost by kind, and pictures."""

from __future__ import annotations

import json
from typing import Any

import polars as pl

from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.report import Headline, Section, StageReport
from mmfoundry.pipeline.report_parts.charts import bars
from mmfoundry.pipeline.report_parts.html import Markup, details, join, percent, picture, table, tag

EXAMPLES = "examples.parquet"


def report(artifact: Artifact, name: str) -> StageReport:
    """Headlines and sections of a filter artifact."""
    funnel = json.loads((artifact.path / "funnel.json").read_text(encoding="utf-8"))
    kept, total = funnel["kept"], funnel["samples"] + sum(funnel["damaged"].values())
    headlines = [Headline("of the raw pairs are kept", percent(kept / total), f"{kept:,} of {total:,}")]
    truth = funnel["truth"]
    metrics = artifact.manifest.metrics
    if "bad_dropped" in metrics:
        note = f"and {percent(metrics['good_dropped'])} of the good ones lost"
        headlines.append(
            Headline("of the bad pairs that rules can see are caught", percent(metrics["bad_dropped"]), note)
        )
    body = [_funnel(funnel)]
    if truth:
        body += [tag("h3", "What was caught, and what was lost"), _kinds(truth)]
    if funnel["overlap"]:
        body += _overlaps(funnel)
    body += _troubles(funnel)
    if (artifact.path / EXAMPLES).is_file():  # a pool of metadata alone has no pictures
        body += [tag("h3", "Kept and dropped, filter by filter"), _pictures(artifact, funnel)]
    intro = (
        f"Each filter sees what the ones before it left. Of {total:,} pairs ({funnel['captions']:,} captions), "
        f"{kept:,} go on ({funnel['captions_kept']:,} captions)."
    )
    return StageReport(
        headlines, [Section(f"Filtering: {name}" if name != "filter" else "Filtering", intro, join(body))]
    )


def _funnel(funnel: dict[str, Any]) -> Markup:
    rows = []
    for one in funnel["filters"]:
        step, alone = one["sequence"], one["alone"]
        by_itself = f" (alone {alone['dropped']:,})" if alone else ""
        text = f"{step['kept']:,} left · drops {step['dropped']:,}{by_itself}"
        rows.append((one["name"], step["kept"], step["dropped"], text))
    return bars(rows, funnel["samples"])


def _overlaps(funnel: dict[str, Any]) -> list[Markup]:
    """How much of what each filter drops alone the others drop as well."""
    names, both = funnel["overlap"]["filters"], funnel["overlap"]["dropped_by_both"]
    active = [number for number in range(len(names)) if both[number][number]]
    if len(active) < 2:
        return []
    rows = []
    for place, row in enumerate(active, 1):
        cells = []
        for column in active:
            count, share = both[row][column], both[row][column] / both[row][row]
            title = f"{names[row]} drops {both[row][row]:,}; {percent(share)} of these {names[column]} drops, too"
            shade = None if row == column else f"--share:{100 * share:.1f}%"
            cells.append(tag("td", f"{count:,}" if count else "·", class_="num", style=shade, title=title))
        rows.append(tag("tr", tag("th", f"{place}  {names[row]}"), cells))
    head = tag(
        "tr", tag("th", "dropped, each filter alone, by both of"), [tag("th", n + 1) for n in range(len(active))]
    )
    grid = tag("table", tag("thead", head), tag("tbody", rows), class_="overlap")
    text = (
        "Samples that two filters both drop, each applied to the whole pool by itself; on the diagonal, all that one "
        "drops. The darker, the larger the part of the row's samples that the column's filter drops as well."
    )
    return [tag("h3", "Where filters overlap"), tag("p", text), tag("div", grid, class_="scroll")]


def _troubles(funnel: dict[str, Any]) -> list[Markup]:
    """What could not be read, and uids that stand for several samples; nothing where there is nothing to tell."""
    rows: list[list[Any]] = []
    rows += [[f"sample: {reason}", count] for reason, count in funnel["unreadable"].items()]
    rows += [[f"place in a shard: {reason}", count] for reason, count in funnel["damaged"].items()]
    repeated = funnel.get("repeated_uids") or {}
    if repeated.get("samples"):
        rows.append(["samples whose uid an earlier one has", repeated["samples"]])
    if repeated.get("conflicting"):
        examples = ", ".join(repeated["examples"])
        rows.append([f"uids that stand for different samples, e.g. {examples}", repeated["conflicting"]])
    return [tag("h3", "What is wrong with the pool"), table(["found", "how many"], rows)] if rows else []


def _kinds(truth: dict[str, Any]) -> Markup:
    rows = []
    for kind, found in truth["bad"].items():
        by = ", ".join(
            f"{name} {count}" for name, count in sorted(found["dropped_by"].items(), key=lambda item: -item[1])
        )
        seen = "" if found["seen"] else "no rule here can see it"
        rows.append([kind.replace("_", " "), found["samples"], _meter(found["dropped"] / found["samples"]), by or seen])
    good = truth["good"]
    by = ", ".join(f"{name} {count}" for name, count in good["dropped_by"].items())
    share = good["dropped"] / good["samples"] if good["samples"] else 0.0
    rows.append([tag("b", "good pairs"), good["samples"], _meter(share, bad=True), by or "none lost"])
    return table(["pairs that are bad on purpose", "pairs", "dropped", "by, each filter alone"], rows)


def _meter(share: float, bad: bool = False) -> Markup:
    bar = tag("span", tag("span", style=f"width:{100 * share:.1f}%"), class_="meter bad" if bad else "meter")
    return tag("span", bar, percent(share, 0), class_="num")


def _pictures(artifact: Artifact, funnel: dict[str, Any]) -> Markup:
    """Dropped and kept pictures of every filter that dropped something."""
    shown = pl.read_parquet(artifact.path / EXAMPLES).to_dicts()
    blocks = []
    for one in funnel["filters"]:
        dropped = [row for row in shown if row["filter"] == one["name"] and not row["kept"]]
        kept = [row for row in shown if row["filter"] == one["name"] and row["kept"]]
        if not dropped:
            continue
        settings = ", ".join(f"{key} {value}" for key, value in one["parameters"].items() if value is not None)
        blocks.append(
            details(
                f"{one['name']}: drops {one['sequence']['dropped']}" + (f" ({settings})" if settings else ""),
                tag("div", "dropped", class_="soft"),
                _thumbs(dropped),
                tag("div", "kept by it", class_="soft"),
                _thumbs(kept),
                open_=True,
            )
        )
    return join(blocks) if blocks else tag("p", "No filter dropped anything.")


def _thumbs(rows: list[dict[str, Any]]) -> Markup:
    cells = []
    for row in rows:
        said = " / ".join(row["captions"] or []) or "no caption"
        inside = (
            picture(row["png"], said) if row["png"] else tag("span", row["unreadable"] or "no picture", class_="none")
        )
        cells.append(tag("div", tag("figure", inside), tag("div", said, class_="said"), title=f"{row['key']}: {said}"))
    return tag("div", cells, class_="thumbs")
