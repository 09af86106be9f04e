"""The `eval` stage: measure a CLIP and a vision-language model against chance, constant answers and no training."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from mmfoundry.evals.task import Bench, Example, Row, TaskResult, Vlm
from mmfoundry.models.interop.any_clip import before_training, read_clip
from mmfoundry.pipeline.artifact import Artifact, write_atomic
from mmfoundry.pipeline.config import ArtifactRef, StageConfig
from mmfoundry.pipeline.distributed import barrier
from mmfoundry.pipeline.errors import MissingInput
from mmfoundry.pipeline.stage import RunContext, Stage
from mmfoundry.pipeline.torchvision_ops import declare_missing_ops
from mmfoundry.stages.evaluations import EvaluationConfig, as_clip, opener

if TYPE_CHECKING:
    from mmfoundry.pipeline.metrics import StageLog

RESULTS = "results.json"


class EvalConfig(EvaluationConfig, StageConfig):
    """What to measure, and on what."""

    clip: ArtifactRef | None = Field(None, description="CLIP to measure: a pretrain artifact")
    vlm: ArtifactRef | None = Field(None, description="vision-language model to measure: an instruct artifact")
    untrained: bool = Field(True, description="measure the models before training, too, where that can be rebuilt")

    def models(self) -> set[str]:
        """Kinds of model that are given."""
        return {kind for kind, model in (("clip", self.clip), ("vlm", self.vlm)) if model is not None}


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
    clip = untrained = vlm = untrained_vlm = None
    if "clip" in needs and config.clip is not None:
        folder = context.inputs["clip"]
        model = read_clip(folder)
        clip = as_clip(model.to(device))
        if config.untrained:
            untrained = as_clip(before_training(model, folder, config.seed).to(device))
    if "vlm" in needs and config.vlm is not None:
        vlm, untrained_vlm = load_vlms(context.inputs["vlm"], device, config.untrained, context.log)

    return Bench(
        open=opener(context),
        runtime=context.runtime,
        seed=config.seed,
        batch_size=config.batch_size,
        progress=lambda total, text, unit: context.progress(total, f"eval: {text}", unit),
        clip=clip,
        untrained_clip=untrained,
        vlm=vlm,
        untrained_vlm=untrained_vlm,
    )


def load_vlms(folder: Path, device: torch.device, untrained: bool, log: StageLog) -> tuple[Vlm, Vlm | None]:
    """The vision-language model of an artifact, and what it was before training where that is wanted and known."""
    declare_missing_ops()
    # Imported here: transformers takes seconds, which a CLIP's evaluation need not spend.
    from mmfoundry.stages.answering import read_vlm

    vlm = read_vlm(folder, device)
    if not untrained:
        return vlm, None
    try:
        return vlm, read_vlm(folder, device, untrained=True)
    except MissingInput as error:
        log.say(f"eval: no untrained model to compare with: {error}")
        return vlm, None


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
    shown = ", ".join(f"{row.metric.removeprefix(f'{name}_')} {row.shown()}" for row in rows)
    return f"eval: {name} in {seconds:.1f} s: {shown}"


STAGE = Stage("eval", EvalConfig, run, "measure a CLIP and a VLM against chance, constant answers and no training")
