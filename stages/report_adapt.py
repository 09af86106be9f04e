"""What the report shows of an adapt artifact: before and after, what was kept, and pictures of both."""

from __future__ import annotations

from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.report import Headline, Section, StageReport
from mmfoundry.pipeline.report_parts.html import Markup, details, join, percent, tag
from mmfoundry.stages.report_tables import example_cells, read_examples, read_rows, results_table
from mmfoundry.stages.report_training import curves

ABOUT = {
    "adapt_clip": "names that never trained, from a few pictures of each: zero-shot, a linear probe, LoRA",
    "adapt_vlm": "new questions (vlm) and the old ones that must not be lost (vlm_old)",
}
GAINS = {
    "clip_gain": "LoRA over zero-shot, on the same pictures",
    "clip_gain_over_linear_probe": "LoRA over the linear probe, on the same pictures",
    "vlm_gain": "after over before, on new questions",
    "vlm_old_change": "after over before, on old questions",
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
            body += [tag("h3", f"Before and after: {ABOUT[task].split(':')[0]}"), example_cells(examples, wide=True)]
    body.append(details("how it was trained", curves(artifact)))
    intro = "Differences are paired: the same pictures before and after. Of the examples, half are ones that changed."
    title = "Adaptation" if name == "adapt" else f"Adaptation: {name}"
    return StageReport(headlines, [Section(title, intro, join(body))])


def _gains(metrics: dict[str, float]) -> Markup:
    items = []
    for key, words in GAINS.items():
        if key not in metrics:
            continue
        low, high = metrics[f"{key}_low"], metrics[f"{key}_high"]
        sure = "outside" if low > 0 or high < 0 else "not outside"
        text = (
            f": {100 * metrics[key]:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}], {sure} of what chance explains"
        )
        items.append(tag("li", tag("b", words), text))
    return tag("ul", items)
