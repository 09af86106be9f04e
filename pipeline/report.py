"""The report of a run: one self-contained HTML page, made from what lies in the run folder.

The spine knows no stage. Each finished artifact is handed to the maker registered for its kind of stage, which returns
headlines and sections; a kind without a maker gets a table of its metrics. What is common is made here: the chain of
stages, where the time went, the environment, and how to repeat it.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import yaml

from mmfoundry.pipeline.artifact import MANIFEST, Artifact, write_atomic
from mmfoundry.pipeline.errors import MissingInput
from mmfoundry.pipeline.report_parts.charts import shares
from mmfoundry.pipeline.report_parts.html import Markup, compact, details, duration, facts, join, table, tag

REPORT = "report.html"
CONFIGS = "configs"


@dataclass(frozen=True)
class Headline:
    """One number for the top of the page.

    Attributes:
        label: what was measured, in words.
        value: as shown, large.
        note: what to hold it against: interval, chance, best constant answer.
    """

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading of its own.

    Attributes:
        title: the heading.
        intro: one or two sentences for someone who has not read the docs.
        body: what is shown.
        short: its entry in the page's navigation; the title where it is empty.
    """

    title: str
    intro: str
    body: Markup
    short: str = ""


@dataclass(frozen=True)
class StageReport:
    """What one artifact adds to the page."""

    headlines: list[Headline] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)


# The artifact and its name in the run to what the page shows of it.
Maker = Callable[[Artifact, str], StageReport]


def write_report(run_folder: str | Path, makers: Mapping[str, Maker]) -> Path:
    """Build `report.html` in a run folder, from the artifacts that are finished.

    Args:
        run_folder: holds one folder an artifact.
        makers: kind of stage to what shows its artifacts.

    Returns:
        The page's path.

    Raises:
        MissingInput: there is no finished artifact.
        NotEnoughSpace: the disk is full; an older page stays.
    """
    run_folder = Path(run_folder)
    artifacts = find_artifacts(run_folder)
    if not artifacts:
        raise MissingInput(f"{run_folder}: no finished stage in it, so nothing to report; run a recipe first")
    headlines: list[Headline] = []
    sections: list[Section] = []
    for name, artifact in artifacts.items():
        made = makers.get(artifact.manifest.stage, metrics_only)(artifact, name)
        headlines += made.headlines
        sections += made.sections
    sections += [_time(artifacts), _repeat(artifacts, run_folder)]
    path = run_folder / REPORT
    write_atomic(path, page(run_folder.resolve().name, artifacts, headlines, sections))
    return path


def find_artifacts(run_folder: Path) -> dict[str, Artifact]:
    """The finished artifacts of a run by name, in the order in which they were finished."""
    found = {path.parent.name: Artifact.open(path.parent) for path in sorted(run_folder.glob(f"*/{MANIFEST}"))}
    current = {name: each for name, each in found.items() if not name.endswith(".stale")}
    return dict(sorted(current.items(), key=lambda item: item[1].manifest.created))


def metrics_only(artifact: Artifact, name: str) -> StageReport:
    """What is shown of an artifact whose kind has no maker."""
    return StageReport(
        sections=[Section(name, f"Artifact of the stage {artifact.manifest.stage}.", metrics_of(artifact))]
    )


def metrics_of(artifact: Artifact) -> Markup:
    """An artifact's metrics as a table."""
    return table(["metric", "value"], [(key, compact(value)) for key, value in artifact.manifest.metrics.items()])


def page(title: str, artifacts: Mapping[str, Artifact], headlines: list[Headline], sections: list[Section]) -> str:
    """The whole page as text."""
    total = sum(artifact.manifest.seconds for artifact in artifacts.values())
    last = list(artifacts.values())[-1].manifest
    cores = last.environment.get("cores", "?")
    chain = [tag("li", f"{name} · {duration(each.manifest.seconds)}") for name, each in artifacts.items()]
    header = tag(
        "header",
        tag(
            "div",
            tag("h1", f"Run {title}"),
            tag(
                "div",
                f"{len(artifacts)} stages in {duration(total)} on {cores} {last.environment.get('device', '')} cores · "
                f"mmfoundry {last.code_version} · finished {last.created[:16].replace('T', ' ')} UTC",
                class_="soft",
            ),
            tag("ol", chain, class_="chain"),
        ),
    )
    anchors = [f"s{number}" for number in range(len(sections))]
    links = [
        tag("a", each.short or each.title, href=f"#{anchor}") for each, anchor in zip(sections, anchors, strict=True)
    ]
    cards = [
        tag(
            "div",
            tag("div", each.label, class_="label"),
            tag("div", each.value, class_="value"),
            tag("div", each.note, class_="note"),
            class_="card",
        )
        for each in headlines
    ]
    parts = [
        tag("section", tag("h2", each.title, id=anchor), tag("p", each.intro) if each.intro else None, each.body)
        for each, anchor in zip(sections, anchors, strict=True)
    ]
    footer = tag("footer", f"Made {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC from the files of this run; "
                           "the page needs nothing beside it.")  # fmt: skip
    files = resources.files("mmfoundry.pipeline.report_parts")
    style, script = ((files / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # our script and no other
    head = join(
        [
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            # Nothing from elsewhere is loaded or run, even if a caption got past the escaping.
            tag(
                "meta",
                http_equiv="Content-Security-Policy",
                content=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'",
            ),
            tag("title", f"{title} · mmfoundry"),
            tag("style", Markup(style)),
        ]
    )
    body = join([header, tag("nav", tag("div", links)), tag("main", tag("div", cards, class_="cards"), parts, footer)])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}<script>{script}</script></body></html>\n'


def _time(artifacts: Mapping[str, Artifact]) -> Section:
    parts = [(name, artifact.manifest.seconds) for name, artifact in artifacts.items()]
    return Section("Time", "Where the wall time went; a stage that was cut off counts all of its parts.", shares(parts))


def _repeat(artifacts: Mapping[str, Artifact], run_folder: Path) -> Section:
    manifests = [artifact.manifest for artifact in artifacts.values()]
    environment = {key: value for manifest in manifests for key, value in manifest.environment.items()}
    blocks = []
    for name, artifact in artifacts.items():
        manifest = artifact.manifest
        config = yaml.safe_dump(manifest.config, sort_keys=False, allow_unicode=True)
        command = f"mmfoundry {manifest.stage} {run_folder / CONFIGS / name}.yaml output={run_folder / name}"
        known = facts(
            {
                "seed": manifest.seed,
                "content": f"sha256 {manifest.digest[:16]}…",
                "inputs": ", ".join(f"{key} ({record.digest[:20]}…)" for key, record in manifest.inputs.items())
                or "none",
            }
        )
        repeat = tag("pre", command) if (run_folder / CONFIGS / f"{name}.yaml").is_file() else None
        blocks.append(details(f"{name}: config, inputs, command", known, repeat, tag("pre", config)))
    intro = "What this ran on, and each stage's whole config: the same seed and inputs give the same result."
    return Section("Environment and repeating", intro, facts(environment) + join(blocks), "Repeat")
