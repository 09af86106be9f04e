"""What the report shows of an adapt artifact: before and after, what was kept, and pictures of both."""

from __future__ import annotations

from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.report import Headline, Section, StageReport
from mmfoundry.pipeline.report_parts.html import Markup, details, join, percent, tag
from mmfoundry.stages.report_tables import example_cells, read_examples, read_rows, results_table
from mmfoundry.stages.report_training import curves

ABOUT = {
    "adapt_clip": "new names, from a few pictures of each (clip), and the old ones that must not be lost (clip_old)",
    "adapt_vlm": "new questions (vlm) and the old ones that must not be lost (vlm_old)",
}
HEADINGS = {"adapt_clip": "new names", "adapt_vlm": "new questions"}
GAINS = {
    "clip_gain": "new names, adapted against zero-shot",
    "clip_gain_over_linear_probe": "new names, adapted against a linear probe on the same shots",
    "clip_old_change": "old names, after against before",
    "vlm_gain": "new questions, after against before",
    "vlm_old_change": "old questions, after against before",
}


def report(artifact: Artifact, name: str) -> StageReport:
    """Headlines and sections of an adapt artifact."""
    metrics = artifact.manifest.metrics
    headlines = [
        Headline(
            f"{words} after adapting",
            percent(metrics[f"{part}_after"], 0),
            f"before: {percent(metrics[f'{part}_before'])}",
        )
        for part, words in (("clip", "new names right"), ("vlm", "new questions right"))
        if f"{part}_after" in metrics
    ]
    rows = [
        row
        for file in ("clip_results.json", "vlm_results.json")
        if (artifact.path / file).is_file()
        for row in read_rows(artifact.path / file)
    ]
    body = [results_table(rows, ABOUT), _gains(metrics)]
    for task in ABOUT:
        examples = read_examples(artifact.path / "examples" / task)
        if examples:
            body += [tag("h3", f"Before and after: {HEADINGS[task]}"), example_cells(examples, wide=True)]
    body.append(details("how it was trained", curves(artifact)))
    intro = (
        "Small adapters (LoRA) on finished models. Differences are paired: the same pictures before and after. "
        "Of the examples, half are ones that changed."
    )
    title = "Adaptation" if name == "adapt" else f"Adaptation: {name}"
    return StageReport(headlines, [Section(title, intro, join(body))])


def _gains(metrics: dict[str, float]) -> Markup:
    items = []
    for key, words in GAINS.items():
        if key not in metrics:
            continue
        low, high = metrics[f"{key}_low"], metrics[f"{key}_high"]
        sure = "" if low > 0 or high < 0 else ": may be no change at all"
        text = f": {100 * metrics[key]:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]{sure}"
        items.append(tag("li", tag("b", words), text))
    return tag("ul", items)
