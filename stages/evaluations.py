"""What is measured, on what: shared by the `eval` stage and by stages that measure the model they train."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from pydantic import Field, SerializeAsAny, field_validator, model_validator

from mmfoundry.data.reader import Pool
from mmfoundry.evals.samples import Samples, select
from mmfoundry.evals.suite import load_suite, parse_task, selections
from mmfoundry.evals.task import Bench, Clip, EvalTask, Selection, Vlm
from mmfoundry.models.interop.any_clip import AnyClip
from mmfoundry.models.open_clip_model import OpenClip
from mmfoundry.pipeline.config import Config, ShardsRef
from mmfoundry.pipeline.engine import autocast
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.progress import Progress
from mmfoundry.pipeline.registry import unknown
from mmfoundry.pipeline.stage import RunContext
from mmfoundry.pipeline.trainer_config import TrainerConfig
from mmfoundry.stages.captions import tokenizer_of

TASK_NAME = re.compile(r"[a-z0-9_]+")


class EvaluationConfig(Config):
    """Evaluations, and the data that they run on."""

    data: dict[str, ShardsRef] = Field(description="data sets by the names that the tasks use: artifacts, tars, globs")
    suite: str | None = Field(None, description="a suite of evals/suites (emoji) or a YAML file of that form")
    tasks: dict[str, SerializeAsAny[EvalTask]] = Field(
        default_factory=dict, description="evaluations by name, added to the suite's or in place of them"
    )
    only: list[str] | None = Field(None, min_length=1, description="names of the tasks to run; null: all")
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
    def _fits_together(self) -> EvaluationConfig:
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

    def models(self) -> set[str]:
        """Kinds of model, `clip` and `vlm`, that there are to measure."""
        return {"clip"}

    def to_run(self) -> dict[str, EvalTask]:
        """The tasks that are asked for and whose model is there, in order."""
        wanted, given = self.only or list(self.tasks), self.models()
        return {name: task for name, task in self.tasks.items() if name in wanted and task.needs in given}


class VlmEvaluationConfig(EvaluationConfig):
    """Evaluations of a vision-language model, and the data that they run on."""

    def models(self) -> set[str]:
        """Kinds of model that there are to measure."""
        return {"vlm"}


def check_eval_steps(evaluation: Config | None, trainer: TrainerConfig) -> None:
    """Hold together what is measured while training and how often.

    Raises:
        ValueError: only one of them is given.
    """
    if (evaluation is not None) != (trainer.eval_steps > 0):
        raise ValueError("eval and trainer.eval_steps go together; only one of them is given")


def opener(context: RunContext, prefix: str = "") -> Callable[[Selection], Samples]:
    """How evaluations get their samples; a data set is opened once.

    Args:
        context: of the running stage.
        prefix: dotted field that the `EvaluationConfig` lies in, with a dot behind.
    """

    @cache
    def pool(name: str) -> Pool:
        return Pool(context.shards(f"{prefix}data.{name}"), name=name)

    def opened(selection: Selection) -> Samples:
        return select(pool(selection.data), selection.where, selection.limit)

    return opened


def while_training(
    config: EvaluationConfig,
    context: RunContext,
    prefix: str,
    trainer: TrainerConfig,
    measurable: Callable[[Any], Clip | Vlm],
) -> Callable[[Any, int], dict[str, float]]:
    """What the trainer calls to measure the model that it trains; pictures are shared out over all ranks.

    The model computes in the precision that it is trained in; its embeddings and scores are at least fp32, and so is
    what is made of them.

    Args:
        config: what is measured.
        context: of the running stage.
        prefix: see `opener`.
        trainer: of the phase.
        measurable: the model that is trained, as evaluations see it.

    Returns:
        (model, step) to each metric's value. DamagedInput: a sample of the data cannot be read.
    """
    opened = opener(context, prefix)

    def silent(total: int | None, description: str, unit: str) -> AbstractContextManager[Progress]:
        return nullcontext(Progress(total, description, unit))  # the training's own bar is on the screen

    def evaluate(model: Any, step: int) -> dict[str, float]:
        shown = _computing_in(trainer.precision, context.runtime.device, measurable(model))
        bench = Bench(
            open=opened,
            runtime=context.runtime,
            seed=context.config.seed,
            batch_size=config.batch_size,
            progress=silent,
            clip=shown if isinstance(shown, Clip) else None,
            vlm=shown if isinstance(shown, Vlm) else None,
        )
        return {row.metric: row.value for name, task in config.to_run().items() for row in task.run(name, bench).rows}

    return evaluate


def _computing_in(precision: str, device: torch.device, model: Clip | Vlm) -> Clip | Vlm:
    """The same model, whose arithmetic is of this precision."""

    def under(compute: Callable[..., Any]) -> Callable[..., Any]:
        def computed(*args: Any, **kwargs: Any) -> Any:
            with autocast(precision, device):
                return compute(*args, **kwargs)

        return computed

    if isinstance(model, Clip):
        return replace(model, encode_image=under(model.encode_image), encode_text=under(model.encode_text))
    return replace(model, answer=under(model.answer), score=under(model.score))


def as_clip(model: AnyClip) -> Clip:
    """A CLIP as evaluations see a model: pictures as bytes, texts as strings.

    Raises:
        ConfigError: it wants its pictures or captions prepared in a way that evaluations do not have.
    """
    if isinstance(model, OpenClip):
        model.config.check_resizing()
    tokenize = tokenizer_of(model.config.text_cfg)
    device = model.logit_scale.device

    def encode_image(pictures: torch.Tensor) -> torch.Tensor:
        return model.encode_image(model.pixels(pictures.to(device)))

    def encode_text(texts: list[str]) -> torch.Tensor:
        return model.encode_text(torch.from_numpy(tokenize(texts)).to(device))

    config = model.config
    return Clip(encode_image, encode_text, config.vision_cfg.image_size, config.preprocess_cfg.resize_mode)
