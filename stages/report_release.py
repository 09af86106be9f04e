"""What the report shows of a release artifact: each folder, what loads it, and how near it comes to our own model."""

from __future__ import annotations

import json
import re

from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.report import Section, StageReport
from mmfoundry.pipeline.report_parts.html import Child, Markup, details, join, table, tag
from mmfoundry.stages.release import CHECKS
from mmfoundry.stages.release_card import CARD

_TITLE = re.compile(r"^# (?:.*: )?(.+)$", re.MULTILINE)
_CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def report(artifact: Artifact, name: str) -> StageReport:
    """A section with the released folders."""
    folders: dict[str, int] = {}
    for file, record in artifact.manifest.files.items():
        top, slash, _ = file.partition("/")
        if slash and top != CHECKS:
            folders[top] = folders.get(top, 0) + record.bytes
    rows: list[list[Child]] = []
    codes: list[Markup] = []
    for folder, size in folders.items():
        card = artifact.path / folder / CARD
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        title, code = _TITLE.search(text), _CODE.search(text)
        rows.append(
            [
                tag("code", f"{folder}/"),
                title.group(1) if title else "",
                f"{size / 1e6:,.1f} MB",
                _gap(artifact, folder),
            ]
        )
        if code:
            codes.append(details(f"load {folder}", tag("pre", code.group(1))))
    intro = (
        "Folders that load with nothing of ours installed. Each was loaded again by its own library when it was "
        "written; the last column is the largest difference between its logits and ours."
    )
    body = [table(["folder", "what it is", "size", "off by, at most"], rows), *codes]
    return StageReport(sections=[Section("Release" if name == "release" else f"Release: {name}", intro, join(body))])


def _gap(artifact: Artifact, folder: str) -> str:
    file = artifact.path / CHECKS / f"{folder}.json"
    found = json.loads(file.read_text(encoding="utf-8")).get("difference") if file.is_file() else None
    return "not compared" if found is None else f"{found:.1g}"
