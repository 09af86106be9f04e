"""What the report shows of a scenes artifact: a few scenes of each set, with what is said and asked about them."""

from __future__ import annotations

import json

from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import to_sample
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.report import Section, StageReport
from mmfoundry.pipeline.report_parts.html import Markup, details, facts, join, picture, tag
from mmfoundry.stages.scenes import SETS

SCENES_A_SET = 3
SETS_OPEN = 2  # the others unfold on click


def report(artifact: Artifact, name: str) -> StageReport:
    """A section with the first scenes of each set."""
    sets = json.loads((artifact.path / SETS).read_text(encoding="utf-8"))
    blocks = []
    for number, (each, summary) in enumerate(sets.items()):
        about = (
            f"{summary['count']:,} scenes of {len(summary['concepts'])} things, {' and '.join(summary['styles'])} style"
        )
        cells = _cells(Pool(artifact.path / each))
        shown = tag("div", cells, class_="grid wide")
        blocks.append(details(f"{each}: {about}", shown, open_=number < SETS_OPEN))
    intro = (
        "Pictures composed on a canvas, so that everything true about them is known; rendered once, read like any data."
    )
    return StageReport(sections=[Section("Scenes" if name == "scenes" else f"Scenes: {name}", intro, join(blocks))])


def _cells(pool: Pool) -> list[Markup]:
    cells = []
    for number in range(min(SCENES_A_SET, len(pool))):
        sample = to_sample(pool.get(number))
        said = {"captions": tag("ul", [tag("li", text) for text in sample.text[:3]])}
        asked = [f"{each['question']} {each['answer']}" for each in sample.meta.get("questions", [])[:4]]
        if asked:
            said["questions"] = tag("ul", [tag("li", text) for text in asked])
        shown = picture(sample.image, sample.text[0] if sample.text else sample.key)
        cells.append(tag("div", shown, facts(said), class_="cell side"))
    return cells
