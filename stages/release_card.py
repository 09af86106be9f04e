"""Model cards: the README.md of each released folder, written from the manifests of the stages that made the model.

A card says how the folder is loaded, what it was trained on, how it was measured, and repeats every config, so that
the model can be made again. Numbers come from manifests and result files; only what no manifest can know (licence,
credits, a description) comes from the release's config.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field

from mmfoundry.evals.task import EVAL_TASKS
from mmfoundry.pipeline.artifact import MANIFEST, Artifact, Manifest, write_atomic
from mmfoundry.pipeline.config import Config
from mmfoundry.stages.eval import RESULTS as EVAL_RESULTS
from mmfoundry.stages.release_snippets import SNIPPETS

if TYPE_CHECKING:
    from mmfoundry.stages.release import ReleaseConfig

CARD = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Kind:
    """What the hub and the card's head say of one sort of folder.

    Attributes:
        title: what it is, in words.
        library: the hub's `library_name`.
        pipeline: the hub's `pipeline_tag`.
        needs: which model an evaluation must be about to be shown: `clip` or `vlm`.
        results: file of an adapt artifact that holds the table of this adapter; None for whole models.
    """

    title: str
    library: str
    pipeline: str
    needs: str
    results: str | None = None


BASES = {"clip-lora": "clip-transformers", "vlm-lora": "vlm"}  # folder that an adapter goes on, in its snippet
KINDS = {
    "clip-open_clip": Kind("CLIP for open_clip", "open_clip", "zero-shot-image-classification", "clip"),
    "clip-transformers": Kind("CLIP for transformers", "transformers", "zero-shot-image-classification", "clip"),
    "vlm": Kind("vision-language model for transformers", "transformers", "image-text-to-text", "vlm"),
    "clip-lora": Kind(
        "LoRA of the CLIP, for peft", "peft", "zero-shot-image-classification", "clip", "clip_results.json"
    ),
    "vlm-lora": Kind(
        "LoRA of the vision-language model, for peft", "peft", "image-text-to-text", "vlm", "vlm_results.json"
    ),
}


class DataCredit(Config):
    """A data set or model that went into a released model."""

    name: str = Field(min_length=1, description="what it is called")
    license: str = Field(min_length=1, description="its licence, e.g. CC-BY 4.0")
    url: str | None = Field(None, description="where it comes from")
    note: str | None = Field(None, description="what was taken from it; who is to be credited")
    used_by: list[Literal["clip", "vlm"]] = Field(
        default=["clip", "vlm"], description="models (with their adapters) whose cards name it"
    )


class CardConfig(Config):
    """What a model card says that no manifest knows."""

    license: str = Field(
        pattern=r"^[a-z0-9][a-z0-9.-]*$", description="of the weights, as the hub writes it, e.g. apache-2.0"
    )
    language: list[str] = Field(default=["en"], description="languages of the captions, as two-letter codes")
    description: str = Field("", description="a paragraph: what the model is for, and what it is not for")
    data: list[DataCredit] = Field(default=[], description="data and models that went into it, with licences")
    language_model: str | None = Field(
        None, description="hub id of the vision-language model's language model; null: as the instruct stage names it"
    )
    command: str | None = Field(None, description="the command that makes everything again, e.g. of a recipe")


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        folder: of the release.
        source: the model's or adapter's artifact or folder.
        measured: the artifact that holds its measurements; None where it was not measured.
        facts: what it is made of, in words, by name.
        base: id of the model that an adapter goes on.
    """

    folder: str
    source: Path
    measured: Path | None
    facts: Mapping[str, str]
    base: str | None = None


def write_card(file: Path, subject: Subject, config: ReleaseConfig, difference: float | None) -> None:
    """Write the card of one folder.

    Args:
        file: to write.
        subject: what it is about.
        config: of the stage.
        difference: the largest between its logits and the model's as trained; None where that was not compared.
    """
    kind = KINDS[subject.folder]
    steps = lineage(subject.source)
    head = yaml.safe_dump(front_matter(subject, config, steps), sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{head}---\n\n# {config.name}: {kind.title}",
        config.card.description.strip(),
        _loading(subject, difference),
        _settings(subject, kind, steps),
        _results(subject, kind),
        _data(config.card, kind),
        _making(steps, subject, config.card),
    ]
    write_atomic(file, "\n\n".join(part for part in sections if part) + "\n")


def front_matter(subject: Subject, config: ReleaseConfig, steps: Sequence[Step]) -> dict[str, Any]:
    """The fields that the hub reads (see its model card metadata specification)."""
    kind = KINDS[subject.folder]
    fields: dict[str, Any] = {
        "license": config.card.license,
        "language": config.card.language,
        "library_name": kind.library,
        "pipeline_tag": kind.pipeline,
    }
    if subject.base is not None:
        fields |= {"base_model": subject.base, "base_model_relation": "adapter"}
    elif subject.folder == "vlm":
        named = config.card.language_model or next(
            (str(step.manifest.config["language_model"]) for step in steps if step.manifest.stage == "instruct"), ""
        )
        if _HUB_ID.fullmatch(named) and not Path(named).exists():
            fields |= {"base_model": named, "base_model_relation": "finetune"}
    return fields | {"tags": ["mmfoundry", *(["lora"] if subject.base is not None else [kind.needs])]}


def for_hub(text: str, ids: Mapping[str, str]) -> str:
    """A card with the folders' names replaced by repository ids, where it names them to load them.

    Args:
        text: of the card.
        ids: folder of the release -> repository id.
    """
    for folder, repository in ids.items():
        text = text.replace(f'"local-dir:{folder}"', f'"hf-hub:{repository}"').replace(f'"{folder}"', f'"{repository}"')
        text = text.replace(f"base_model: {folder}\n", f"base_model: {repository}\n")
    return text


@dataclass(frozen=True)
class Step:
    """A stage that had a part in making the model: its artifact as the next stage's config called it, its manifest."""

    ref: str
    manifest: Manifest


def lineage(source: Path) -> list[Step]:
    """The stages that made what is at a path, first to last; those whose artifacts are still there."""
    found: dict[str, Step] = {}

    def visit(path: Path, ref: str) -> None:
        folder = next((each for each in (path, *path.parents) if (each / MANIFEST).is_file()), None)
        if folder is None:
            return
        manifest = Artifact.open(folder).manifest
        if manifest.digest in found:
            return
        for record in manifest.inputs.values():
            visit(Path(record.ref), record.ref)
        found.setdefault(manifest.digest, Step(ref, manifest))

    visit(source, str(source))
    return list(found.values())


def _loading(subject: Subject, difference: float | None) -> str:
    code = SNIPPETS[subject.folder].strip()
    if subject.base is not None:
        code = code.replace(f'"{BASES[subject.folder]}"', json.dumps(subject.base))
    lines = [f"## Loading it\n\n```python\n{code}\n```"]
    if difference is not None:
        lines.append(
            f"When this folder was written it was loaded again in this way: its logits are within {difference:.1e} of "
            "those of the model as it was trained (fp32)."
        )
    lines.append(
        "Pictures with transparent parts were put on white in training. Libraries only drop the transparency, so put "
        "such pictures on white first."
    )
    return "\n\n".join(lines)


def _settings(subject: Subject, kind: Kind, steps: Sequence[Step]) -> str:
    lines = [
        "## Settings",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {key} | {text} |" for key, text in subject.facts.items()),
    ]
    if steps:
        config = steps[-1].manifest.config
        trained = config.get(kind.needs) if subject.base is not None else config
        lines += [f"| {name} | {text} |" for name, text in _training(trained)]
    return "\n".join(lines)


def _training(config: Any, path: str = "training") -> Iterator[tuple[str, str]]:
    """The phases of a stage's config that have a trainer, each in one line."""
    if not isinstance(config, dict):
        return
    trainer = config.get("trainer")
    if isinstance(trainer, dict):
        optimizer, schedule = (trainer.get(key) or {} for key in ("optimizer", "scheduler"))
        parts = {
            "steps of": trainer.get("max_steps"),
            "samples in steps of": trainer.get("max_samples"),
            "epochs in steps of": trainer.get("max_epochs"),
            "samples": trainer.get("train_batch_size"),
        }
        said = [f"{value} {name}" for name, value in parts.items() if value is not None]
        rate = [f"learning rate {optimizer['lr']:g}"] if "lr" in optimizer else []
        kinds = [str(each["type"]) for each in (optimizer, schedule) if "type" in each]
        precision = [str(trainer["precision"])] if "precision" in trainer else []
        yield path, ", ".join([" ".join(said), *kinds, *rate, *precision])
    for name, part in config.items():
        if name != "trainer":
            yield from _training(part, f"training: {name}")


def _results(subject: Subject, kind: Kind) -> str:
    if subject.measured is None:
        return ""
    manifest = Artifact.open(subject.measured).manifest
    table = json.loads((subject.measured / (kind.results or EVAL_RESULTS)).read_text(encoding="utf-8"))["rows"]
    if kind.results is None:
        tasks = manifest.config["tasks"]
        table = [row for row in table if EVAL_TASKS[tasks[row["task"]]["task"]].needs == kind.needs]
    if not table:
        return ""
    losses = " (losses in nats a token)" if any(row.get("unit") == "nats" for row in table) else ""
    lines = [
        "## Results",
        "",
        f"Shares of 1{losses}, with 95% bootstrap intervals. *Chance* guesses blindly, *constant* is the best answer "
        "that ignores the picture, *untrained* the same model before training; - where there is no such number.",
        "",
        "| metric | value | 95% | n | chance | constant | untrained |",
        "| --- | --: | :-: | --: | --: | --: | --: |",
    ]
    for row in table:
        cells = [_number(row[key]) for key in ("chance", "constant", "untrained")]
        span = f"{_number(row['low'])} - {_number(row['high'])}"
        lines.append(f"| {row['metric']} | {_number(row['value'])} | {span} | {row['n']} | {' | '.join(cells)} |")
    changes = list(_differences(manifest, kind)) if kind.results else []
    if changes:
        lines += ["", f"Paired differences, with 95% intervals: {'; '.join(changes)}."]
    return "\n".join(lines)


def _differences(manifest: Manifest, kind: Kind) -> Iterator[str]:
    """Gains and losses among an adapt stage's metrics."""
    for name, value in manifest.metrics.items():
        low, high = (manifest.metrics.get(f"{name}_{end}") for end in ("low", "high"))
        part = name.removeprefix(f"{kind.needs}_")
        if part != name and low is not None and high is not None and re.search("gain|change", part):
            yield f"{name} {value:+.3f} ({low:+.3f} to {high:+.3f})"


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _data(card: CardConfig, kind: Kind) -> str:
    credits = [entry for entry in card.data if kind.needs in entry.used_by]
    if not credits:
        return ""
    lines = ["## Data and licences", "", f"The weights: {card.license}. What they come from:", ""]
    for entry in credits:
        name = f"[{entry.name}]({entry.url})" if entry.url else entry.name
        lines.append(f"- {name}, {entry.license}{f': {entry.note}' if entry.note else ''}")
    return "\n".join(lines)


def _making(steps: Sequence[Step], subject: Subject, card: CardConfig) -> str:
    """How the model was made and measured, and how that is done again."""
    if not steps:
        return ""
    environment = ", ".join(f"{key} {value}" for key, value in steps[-1].manifest.environment.items())
    if subject.measured is not None and subject.measured != subject.source:
        steps = [*steps, Step(str(subject.measured), Artifact.open(subject.measured).manifest)]
    lines = ["## How it was made", ""]
    if card.command:
        lines += ["All of it again:", "", f"```\n{card.command}\n```", ""]
    lines += [
        "Step by step, each with the config below as a YAML file:",
        "",
        "| step | command | seed | seconds | made with | content |",
        "| --- | --- | --: | --: | --- | --- |",
    ]
    names = _step_names(steps)
    for name, step in zip(names, steps, strict=True):
        manifest = step.manifest
        command = f"`mmfoundry {manifest.stage} {name}.yaml output={_artifact_of(step)}`"
        made = f"mmfoundry {manifest.code_version}"
        lines.append(
            f"| {name} | {command} | {manifest.seed} | {manifest.seconds:.0f} | {made} | `{manifest.digest[:12]}` |"
        )
    lines += ["", f"It was made with {environment}."]
    for name, step in zip(names, steps, strict=True):
        text = yaml.safe_dump(step.manifest.config, sort_keys=False, allow_unicode=True).rstrip()
        lines += ["", f"<details><summary>{name}.yaml</summary>", "", f"```yaml\n{text}\n```", "", "</details>"]
    return "\n".join(lines)


def _artifact_of(step: Step) -> str:
    """The folder of a step's artifact, as the configs of later steps name it."""
    path = Path(step.ref)
    return str(next((each for each in (path, *path.parents) if (each / MANIFEST).is_file()), path))


def _step_names(steps: Sequence[Step]) -> list[str]:
    """The stages' names, numbered where one comes twice."""
    stages = [step.manifest.stage for step in steps]
    return [
        stage if stages.count(stage) == 1 else f"{stage}-{stages[:position].count(stage) + 1}"
        for position, stage in enumerate(stages)
    ]
