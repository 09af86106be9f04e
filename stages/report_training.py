"""What the report shows of an artifact that was trained: its curves, phase by phase, and its speed."""

from __future__ import annotations

from typing import Any

from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.metrics import METRICS_FILE, read_metrics
from mmfoundry.pipeline.report import Section, StageReport, metrics_of
from mmfoundry.pipeline.report_parts.charts import Line, line_chart, smooth
from mmfoundry.pipeline.report_parts.html import Markup, details, join, tag

# Curves in this order first, if they are there, then the others by name; these are smoothed, and these are logarithmic.
FIRST = ("loss", "accuracy", "lr", "grad_norm", "samples_per_second")
NOISY = frozenset(("loss", "accuracy", "grad_norm"))
MIN_POINTS = 3
HALF_LIVES = 30  # half-lives of the smoothing in a whole curve
INTROS = {
    "pretrain": "Contrastive pretraining: pictures and captions are pulled together, all other pairs of a batch apart. "
    "Accuracy is how often a picture's own caption scores highest in its batch.",
    "instruct": "A connector learns to speak the language model's vectors (align); then both learn to answer (tune), "
    "the loss on answer tokens only.",
    "adapt": "Small adapters (LoRA) learn what the finished models could not do; the rest of the weights stays.",
}


def report(artifact: Artifact, name: str) -> StageReport:
    """Curves of a trained artifact."""
    stage = artifact.manifest.stage
    body = [curves(artifact), details("all metrics of the stage", metrics_of(artifact))]
    return StageReport(sections=[Section(f"Training: {name}", INTROS.get(stage, ""), join(body))])


def curves(artifact: Artifact) -> Markup:
    """Charts for each phase, those of parts folded away; points stand at their step."""
    path = artifact.path / METRICS_FILE
    if not path.is_file():
        return tag("p", "No curves: nothing was logged while training.")
    phases: dict[str, list[dict[str, Any]]] = {}
    for line in read_metrics(path):
        phases.setdefault(line["phase"], []).append(line)
    blocks = []
    for phase, lines in phases.items():
        names = sorted({key for line in lines for key in line} - {"phase", "step"}, key=_order)
        charts = {each: chart for each in names if (chart := _chart(each, lines)) is not None}
        heading = tag("h3", f"{phase}, {lines[-1]['step']:,} steps") if len(phases) > 1 else None
        main = [chart for each, chart in charts.items() if not _is_part(each)]
        parts = [chart for each, chart in charts.items() if _is_part(each)]
        blocks.append(join([heading, tag("div", main, class_="charts")]))
        if parts:
            blocks.append(details("by part of the model, and by source", tag("div", parts, class_="charts")))
    return join(blocks)


def _is_part(name: str) -> bool:
    """Whether a curve is one of several of a kind, such as `param_norm/text_model`; evaluations are looked at first."""
    return "/" in name and not name.startswith("eval/")


def _order(name: str) -> tuple[int, str]:
    return (FIRST.index(name) if name in FIRST else len(FIRST), name)


def _chart(name: str, lines: list[dict[str, Any]]) -> Markup | None:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    if len(points) < MIN_POINTS:
        return None
    x, y = [step for step, _ in points], [value for _, value in points]
    title = name.replace("_", " ")
    if name in NOISY:
        return line_chart(title, [Line("each step", x, y, faint=True), Line(name, x, smooth(y, len(y) / HALF_LIVES))])
    return line_chart(title, [Line(name, x, y)])
