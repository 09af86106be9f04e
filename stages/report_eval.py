"""What the report shows of an eval artifact: results against their baselines, retrieval and answers with pictures."""

from __future__ import annotations

from typing import Any

from mmfoundry.evals.task import EVAL_TASKS
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.report import Headline, Section, StageReport
from mmfoundry.pipeline.report_parts.html import Markup, join, percent, tag
from mmfoundry.stages.eval import RESULTS
from mmfoundry.stages.report_tables import example_cells, read_examples, read_rows, results_table

# Metrics that go to the top of the page, in words; the first ones that a run has.
HEADLINES = {
    "image_to_text_r5": "pictures whose caption is among the 5 nearest",
    "text_to_image_r5": "captions whose picture is among the 5 nearest",
    "zeroshot_names_top5": "names among the top 5, in a style never seen",
    "vqa_count": "“how many” answered right",
    "vqa_where": "“where” answered right",
    "vqa_presence": "“is there” answered right",
    "vqa_what": "“what is” answered right",
}
# kind of task -> heading of its examples, what they are, entry in the navigation
TITLES = {
    "zero_shot": (
        "Names and kinds, from prompts alone",
        "The classes whose prompts lie nearest to each picture, nearest first; drawn by the seed.",
        "Names",
    ),
    "retrieval": (
        "Retrieval",
        "Queries drawn by the seed: a picture with the captions nearest to it, then a caption with the pictures "
        "nearest to it, its own in a green frame.",
        "Retrieval",
    ),
    "hard_negatives": (
        "Almost the same words, but wrong",
        "The caption of each picture, and the wrong one that came nearest to it or passed it.",
        "Hard negatives",
    ),
    "vqa": (
        "Answers beside pictures",
        "Of each type of question up to three wrong answers, drawn by the seed, and right ones to make six.",
        "Answers",
    ),
}


def report(artifact: Artifact, name: str) -> StageReport:
    """Headlines and sections of an eval artifact."""
    rows = read_rows(artifact.path / RESULTS)
    by_metric = {row["metric"]: row for row in rows}
    headlines = [
        Headline(words, percent(by_metric[metric]["value"], 0), _note(by_metric[metric]))
        for metric, words in HEADLINES.items()
        if metric in by_metric
    ]
    tasks = artifact.manifest.config["tasks"]
    about = {task: _about(settings["task"]) for task, settings in tasks.items()}
    intro = (
        "Every number stands beside what it takes no skill to reach. A filled dot means that the whole interval lies "
        "above every baseline; a hollow one that it does not."
    )
    title = "Evaluation" if name == "eval" else f"Evaluation: {name}"
    sections = [Section(title, intro, results_table(rows, about))]
    shown: dict[str, list[Markup]] = {}
    for task, settings in tasks.items():
        examples = read_examples(artifact.path / "examples" / task)
        if examples:
            block = tag("h3", task.replace("_", " ")) + _examples(settings["task"], examples)
            shown.setdefault(settings["task"], []).append(block)
    for kind, blocks in shown.items():
        heading, intro, short = TITLES.get(kind, (kind.replace("_", " "), "", ""))
        sections.append(Section(heading, intro, join(blocks), short))
    return StageReport(headlines, sections)


def _note(row: dict[str, Any]) -> str:
    parts = [f"{100 * row['low']:.0f}–{100 * row['high']:.0f}%"]
    constant, chance = row.get("constant"), row.get("chance")
    if constant is not None and (chance is None or constant > chance):
        parts.append(f"best constant answer {percent(constant)}")
    elif chance is not None:
        parts.append(f"chance {percent(chance)}")
    return " · ".join(parts)


def _about(kind: str) -> str:
    return next(iter((EVAL_TASKS[kind].__doc__ or "").splitlines()), "")


def _examples(kind: str, examples: list[dict[str, Any]]) -> Markup:
    if kind == "zero_shot":
        return example_cells(examples)
    if kind == "retrieval":
        one = [example for example in examples if len(example["pictures"]) == 1]
        many = [example for example in examples if len(example["pictures"]) > 1]
        return example_cells(one, wide=True) + example_cells(many)
    if kind == "vqa":
        return _by_type(examples)
    return example_cells(examples, wide=True)


def _by_type(examples: list[dict[str, Any]]) -> Markup:
    blocks = []
    for kind in dict.fromkeys(example["fields"].get("type", "") for example in examples):
        part = [example for example in examples if example["fields"].get("type", "") == kind]
        bare = [each | {"fields": {k: v for k, v in each["fields"].items() if k != "type"}} for each in part]
        blocks.append(tag("h3", kind) + example_cells(bare, wide=True))
    return join(blocks)
