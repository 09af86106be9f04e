"""The `eval` stage: measure a CLIP and a vision-language model against chance, constant answers and no training."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field, SerializeAsAny, field_validator, model_validator

from mmfoundry.data.reader import Pool
from mmfoundry.evals.questions import Answer
from mmfoundry.evals.samples import Samples, select
from mmfoundry.evals.suite import load_suite, parse_task, selections
from mmfoundry.evals.task import Bench, Clip, EvalTask, Example, Row, Selection, TaskResult
from mmfoundry.models.interop.any_clip import AnyClip, before_training, read_clip
from mmfoundry.models.open_clip_model import OpenClip
from mmfoundry.pipeline.artifact import Artifact, write_atomic
from mmfoundry.pipeline.config import ArtifactRef, ShardsRef, StageConfig
from mmfoundry.pipeline.distributed import barrier
from mmfoundry.pipeline.errors import ConfigError, MissingInput
from mmfoundry.pipeline.registry import unknown
from mmfoundry.pipeline.stage import RunContext, Stage
from mmfoundry.pipeline.torchvision_ops import declare_missing_ops
from mmfoundry.stages.captions import tokenizer_of

if TYPE_CHECKING:
    from mmfoundry.pipeline.metrics import StageLog

RESULTS = "results.json"
TASK_NAME = re.compile(r"[a-z0-9_]+")


class EvalConfig(StageConfig):
    """What to measure, and on what."""

    clip: ArtifactRef | None = Field(None, description="CLIP to measure: a pretrain artifact")
    vlm: ArtifactRef | None = Field(None, description="vision-language model to measure: an instruct artifact")
    data: dict[str, ShardsRef] = Field(description="data sets by the names that the tasks use: artifacts, tars, globs")
    suite: str | None = Field(None, description="a suite of evals/suites (emoji) or a YAML file of that form")
    tasks: dict[str, SerializeAsAny[EvalTask]] = Field(
        default_factory=dict, description="evaluations by name, added to the suite's or in place of them"
    )
    only: list[str] | None = Field(None, min_length=1, description="names of the tasks to run; null: all")
    untrained: bool = Field(True, description="measure the models before training, too, where that can be rebuilt")
    batch_size: int = Field(64, ge=1, description="pictures a forward pass of the CLIP, each rank")

    @model_validator(mode="before")
    @classmethod
    def _take_in_suite(cls, tree: Any) -> Any:
        """Put the suite's entries into `tasks`, so that the manifest tells what was run."""
        if not isinstance(tree, dict) or not isinstance(tree.get("tasks", {}), dict):
            return tree
        suite = load_suite(tree["suite"]) if isinstance(tree.get("suite"), str) else {}
        return tree | {"tasks": suite | tree.get("tasks", {})}

    @field_validator("tasks", mode="before")
    @classmethod
    def _typed_tasks(cls, tasks: Any) -> Any:
        if not isinstance(tasks, dict):
            return tasks
        for name in tasks:
            if not isinstance(name, str) or not TASK_NAME.fullmatch(name):
                raise ConfigError(f"task {name!r}: lower-case letters, digits and _ only; it becomes a file name")
        return {name: parse_task(name, tree) for name, tree in tasks.items()}

    @model_validator(mode="after")
    def _fits_together(self) -> EvalConfig:
        if not self.tasks:
            raise ConfigError("nothing to measure: give a `suite` or `tasks`")
        for name in self.only or ():
            if name not in self.tasks:
                raise ConfigError(f"only: {unknown('task', name, list(self.tasks))}")
        for name, task in self.to_run().items():
            for selection in selections(task):
                if selection.data not in self.data:
                    raise ConfigError(
                        f"tasks.{name}: data set {selection.data!r} is not in `data`; it has {[*self.data]}"
                    )
        if not self.to_run():
            raise ConfigError("nothing to measure: the tasks need a `clip` or a `vlm`")
        return self

    def to_run(self) -> dict[str, EvalTask]:
        """The tasks that are asked for and whose model is given, in order."""
        given = {"clip": self.clip is not None, "vlm": self.vlm is not None}
        wanted = self.only or list(self.tasks)
        return {name: task for name, task in self.tasks.items() if name in wanted and given[task.needs]}


def run(config: EvalConfig, context: RunContext) -> Artifact:
    """Run every task; those that an earlier, cut-off run finished are not run again.

    Writes `results.json` (table rows), `predictions/<task>.jsonl` and `examples/<task>/` (pictures with answers).

    Raises:
        DamagedInput: a sample of the evaluation data cannot be read.
        MissingInput: a model or data set is not there, or a selection matches nothing.
    """
    tasks = config.to_run()
    left_out = [name for name in config.only or config.tasks if name not in tasks]
    if left_out:
        context.log.say(f"eval: left out, as their model is not given: {', '.join(left_out)}")
    bench = make_bench(config, context)
    rows: list[Row] = []
    for name, task in tasks.items():
        done = context.work / "done" / f"{name}.json"
        barrier(context.runtime.group)  # rank 0 may be about to write what the others look for
        if not done.is_file():
            started = time.monotonic()
            result = task.run(name, bench)
            barrier(context.runtime.group)
            if context.runtime.is_main:
                write_result(context.work, name, result, done)
            context.log.say(_line(name, result.rows, time.monotonic() - started))
            barrier(context.runtime.group)
        rows += [Row(**row) for row in json.loads(done.read_text(encoding="utf-8"))]
    barrier(context.runtime.group)
    if context.runtime.is_main:
        shutil.rmtree(context.work / "done")
        table = {"rows": [dataclasses.asdict(row) for row in rows], "left_out": left_out}
        write_atomic(context.work / RESULTS, json.dumps(table, indent=1) + "\n")
    return context.finish(metrics_of(rows))


def metrics_of(rows: list[Row]) -> dict[str, float]:
    """Flat numbers for the manifest: each metric, and beside it `<metric>_constant` where there is such an answer."""
    constants = {f"{row.metric}_constant": row.constant for row in rows if row.constant is not None}
    return {row.metric: row.value for row in rows} | constants


def make_bench(config: EvalConfig, context: RunContext) -> Bench:
    """Load the models and data sets that the tasks need."""
    needs = {task.needs for task in config.to_run().values()}
    device = context.runtime.device
    clip = untrained = answer = untrained_answer = None
    if "clip" in needs and config.clip is not None:
        folder = context.inputs["clip"]
        model = read_clip(folder)
        clip = as_clip(model.to(device))
        if config.untrained:
            untrained = as_clip(before_training(model, folder, config.seed).to(device))
    if "vlm" in needs and config.vlm is not None:
        answer, untrained_answer = load_answers(context.inputs["vlm"], device, config.untrained, context.log)

    @cache
    def pool(name: str) -> Pool:
        return Pool(context.shards(f"data.{name}"), name=name)

    def opened(selection: Selection) -> Samples:
        return select(pool(selection.data), selection.where, selection.limit)

    return Bench(
        open=opened,
        runtime=context.runtime,
        seed=config.seed,
        batch_size=config.batch_size,
        progress=lambda total, text, unit: context.progress(total, f"eval: {text}", unit),
        clip=clip,
        untrained_clip=untrained,
        answer=answer,
        untrained_answer=untrained_answer,
    )


def as_clip(model: AnyClip) -> Clip:
    """A CLIP as evaluations see a model: pictures as bytes, texts as strings.

    Raises:
        ConfigError: it wants its pictures or captions prepared in a way that evaluations do not have.
    """
    if isinstance(model, OpenClip):
        model.config.check_tokenizer()
        model.config.check_resizing()
    tokenize = tokenizer_of(model.config.text_cfg)
    device = model.logit_scale.device

    def encode_image(pictures: torch.Tensor) -> torch.Tensor:
        return model.encode_image(model.pixels(pictures.to(device)))

    def encode_text(texts: list[str]) -> torch.Tensor:
        return model.encode_text(torch.from_numpy(tokenize(texts)).to(device))

    config = model.config
    return Clip(encode_image, encode_text, config.vision_cfg.image_size, config.preprocess_cfg.resize_mode)


def load_answers(folder: Path, device: torch.device, untrained: bool, log: StageLog) -> tuple[Answer, Answer | None]:
    """The vision-language model of an artifact, and what it was before training where that is wanted and known."""
    declare_missing_ops()
    # Imported here: transformers takes seconds, which a CLIP's evaluation need not spend.
    from mmfoundry.stages.answering import load_answerer

    answer = load_answerer(folder, device)
    if not untrained:
        return answer, None
    try:
        return answer, load_answerer(folder, device, untrained=True)
    except MissingInput as error:
        log.say(f"eval: no untrained model to compare with: {error}")
        return answer, None


def write_result(folder: Path, name: str, result: TaskResult, done: Path) -> None:
    """Write one task's predictions and examples, then its rows: the mark that it is finished."""
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in result.predictions)
    if lines:
        write_atomic(folder / "predictions" / f"{name}.jsonl", lines)
    if result.examples:
        write_examples(folder / "examples" / name, result.examples)
    write_atomic(done, json.dumps([dataclasses.asdict(row) for row in result.rows]))


def write_examples(folder: Path, examples: list[Example]) -> None:
    """Write examples as `examples.json` and one PNG a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, example in enumerate(examples):
        names = [f"{number:03}-{i}.png" for i in range(len(example.pictures))]
        for file, picture in zip(names, example.pictures, strict=True):
            Image.fromarray(np.ascontiguousarray(picture)).save(folder / file)
        entries.append(dataclasses.asdict(example) | {"pictures": names})
    write_atomic(folder / "examples.json", json.dumps(entries, indent=1, ensure_ascii=False) + "\n")


def _line(name: str, rows: list[Row], seconds: float) -> str:
    shown = ", ".join(f"{row.metric.removeprefix(f'{name}_')} {row.value:.1%}" for row in rows)
    return f"eval: {name} in {seconds:.1f} s: {shown}"


STAGE = Stage("eval", EvalConfig, run, "measure a CLIP and a VLM against chance, constant answers and no training")
