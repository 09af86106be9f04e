"""The report's part on a filter run, from accounts as the stage writes them."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.stages.report_filter import report


def shown(folder: Path, **changes: Any) -> str:
    """The HTML of an account of three filters, of a pool without pictures."""
    names = ["unique_uid", "caption_words", "language"]
    drops, alone = [0, 40, 5], [0, 40, 30]
    steps = [
        {
            "name": name,
            "parameters": {},
            "alone": {"kept": 100 - alone[n], "dropped": alone[n], "unjudged": 0, "captions_kept": 100 - alone[n]},
            "sequence": {"in": 100, "kept": 100 - sum(drops[: n + 1]), "dropped": drops[n], "captions_kept": 9},
        }
        for n, name in enumerate(names)
    ]
    funnel = {
        "samples": 100,
        "captions": 100,
        "kept": 55,
        "captions_kept": 55,
        "filters": steps,
        "overlap": {"filters": names, "dropped_by_both": [[0, 0, 0], [0, 40, 25], [0, 25, 30]]},
        "unreadable": {},
        "damaged": {},
        "truth": None,
        "repeated_uids": {"uids": 0, "samples": 0, "conflicting": 0, "examples": []},
    }
    (folder / "funnel.json").write_text(json.dumps(funnel | changes))
    made = report(Artifact(folder, SimpleNamespace(metrics={})), "filter")  # type: ignore[arg-type]
    return str(made.sections[0].body)


def test_overlaps_are_of_what_the_row_drops(tmp_path: Path) -> None:
    text = shown(tmp_path)
    assert "caption_words drops 40; 62.5% of these language drops, too" in text
    assert "language drops 30; 83.3% of these caption_words drops, too" in text
    assert re.findall(r"--share:([\d.]+)%", text) == ["62.5", "83.3"]
    assert "1  caption_words" in text  # what drops nothing has no row
    assert "unique_uid drops" not in text


def test_filters_that_were_not_judged_alone_have_no_overlap(tmp_path: Path) -> None:
    whole = json.loads((tmp_path / "funnel.json").read_text()) if shown(tmp_path) else {}
    steps = [step | {"alone": None} for step in whole["filters"]]
    text = shown(tmp_path, overlap=None, filters=steps)
    assert "overlap" not in text
    assert "60 left · drops 40<" in text


def test_one_filter_that_drops_overlaps_with_none(tmp_path: Path) -> None:
    alone = {"filters": ["a", "b"], "dropped_by_both": [[3, 0], [0, 0]]}
    assert "overlap" not in shown(tmp_path, overlap=alone)


def test_what_is_wrong_with_the_pool_is_told(tmp_path: Path) -> None:
    assert "What is wrong" not in shown(tmp_path)
    text = shown(
        tmp_path,
        unreadable={"<b>damaged image</b>": 7},
        damaged={"cut off": 2},
        repeated_uids={"uids": 3, "samples": 4, "conflicting": 1, "examples": ["0" * 32]},
    )
    assert "sample: &lt;b&gt;damaged image&lt;/b&gt;" in text
    for found, count in (
        ("place in a shard: cut off", 2),
        ("whose uid an earlier one has", 4),
        (f"e.g. {'0' * 32}", 1),
    ):
        assert re.search(rf"{re.escape(found)}</td><td class=\"num\">{count}</td>", text), found
