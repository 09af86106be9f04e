"""What an evaluation is: a typed config with a `run`, which measures models handed to it as callables.

An evaluation knows no checkpoint format and no model class, so any model that can embed pictures and texts, or answer
questions about pictures, is measured by the same code. To add one: a file with a class registered here.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from mmfoundry.evals.metrics import Estimate
from mmfoundry.evals.questions import Answer, Question, Score, ask
from mmfoundry.evals.samples import Samples
from mmfoundry.pipeline.config import Config
from mmfoundry.pipeline.distributed import Runtime, all_gather_rows
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.progress import Progress, progress_bar
from mmfoundry.pipeline.registry import Registry


@dataclass(frozen=True)
class Clip:
    """A model that embeds pictures and texts in one space.

    Attributes:
        encode_image: uint8 (b, 3, image_size, image_size) to float (b, D), L2-normalised.
        encode_text: b texts to float (b, D), L2-normalised.
        image_size: side of the square that `encode_image` wants, pixels.
        resize_mode: how a picture becomes one; see `EvalTransform`.
    """

    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[list[str]], Tensor]
    image_size: int
    resize_mode: Literal["shortest", "squash"] = "shortest"


@dataclass(frozen=True)
class Vlm:
    """A model that answers questions about pictures.

    Attributes:
        answer: writes answers.
        score: says how well it foresees answers that are given.
    """

    answer: Answer
    score: Score


@dataclass(frozen=True)
class Row:
    """One line of the results table.

    Attributes:
        task: entry of the suite that it belongs to.
        metric: unique key, e.g. `zeroshot_names_top1`.
        value: of the model under test, in `unit`.
        low, high: 95% bootstrap interval.
        n: samples behind it.
        chance: what blind guessing scores in expectation.
        untrained: what the same architecture scores before training; None where it was not measured.
        constant: what the best answer that ignores the picture scores; None where no such answer exists.
        unit: `share` of 1, of which more is better, or `nats` a token, of which less is.
    """

    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    chance: float | None = None
    untrained: float | None = None
    constant: float | None = None
    unit: Literal["share", "nats"] = "share"

    @classmethod
    def of(
        cls,
        task: str,
        metric: str,
        estimate: Estimate,
        *,
        chance: float | None = None,
        untrained: float | None = None,
        constant: float | None = None,
    ) -> "Row":
        """A row from an estimate and any of `chance`, `untrained`, `constant`."""
        value, low, high = estimate.value, estimate.low, estimate.high
        return cls(task, metric, value, low, high, estimate.n, chance, untrained, constant)

    def shown(self) -> str:
        """The value as people read it."""
        return f"{self.value:.1%}" if self.unit == "share" else f"{self.value:.4f}"


@dataclass(frozen=True)
class Example:
    """Pictures with what the model made of them, for people to look at.

    Attributes:
        pictures: uint8 (H, W, 3) each.
        right: whether the model's answer was right.
        fields: what to show beside the pictures, in order: plain text, or a list of plain texts.
        marked: of several pictures, which are right; empty where that says nothing.
    """

    pictures: list[NDArray[np.uint8]]
    right: bool
    fields: Mapping[str, str | list[str]]
    marked: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class TaskResult:
    """What a task found: table rows, one prediction a sample (JSON values), and some examples with pictures."""

    rows: list[Row]
    predictions: list[dict[str, Any]] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)


class Selection(Config):
    """Samples of one of the stage's data sets, chosen by their metadata."""

    data: str = Field(description="name of a data set in the eval stage's `data`")
    where: dict[str, str | int | bool | list[str]] = Field(
        default_factory=dict, description="metadata fields and the value (or one of the values) that each must have"
    )
    limit: int | None = Field(
        None, ge=1, description="keep this many samples, the first in shard order; null keeps all"
    )


@dataclass(frozen=True)
class Bench:
    """What a task may use: the models, the data, and this process's place among the ranks.

    Attributes:
        open: a `Selection` to its samples.
        runtime: pictures are shared out over its ranks; every rank gets all results.
        clip, untrained_clip: None if the stage was given none.
        vlm, untrained_vlm: None if the stage was given none.
        seed: of bootstrap draws and of anything sampled.
        batch_size: pictures a forward pass.
        progress: (total, description, unit) to a context manager whose `advance` counts finished units.
    """

    open: Callable[[Selection], Samples]
    runtime: Runtime = field(default_factory=Runtime)
    clip: Clip | None = None
    untrained_clip: Clip | None = None
    vlm: Vlm | None = None
    untrained_vlm: Vlm | None = None
    seed: int = 0
    batch_size: int = 64
    progress: Callable[[int | None, str, str], AbstractContextManager[Progress]] = progress_bar
    _asked: dict[tuple[str, bool], dict[tuple[int, str], str]] = field(default_factory=dict)

    def ask(
        self,
        samples: Samples,
        selection: Selection,
        questions: Sequence[Question],
        batch: int,
        untrained: bool = False,
    ) -> list[str]:
        """The VLM's answers, in the order of `questions`; no question about a picture is asked twice in a run.

        Raises:
            ConfigError: there is no vision-language model.
        """
        vlm = self.vlms()["untrained" if untrained else "trained"]
        known = self._asked.setdefault((selection.model_dump_json(), untrained), {})
        new = [question for question in questions if (question.row, question.text) not in known]
        with self.progress(len(new), f"questions{' to the untrained model' if untrained else ''}", "answers") as shown:
            replies = ask(vlm.answer, samples, new, self.runtime, batch, shown)
        known.update({(question.row, question.text): reply for question, reply in zip(new, replies, strict=True)})
        return [known[question.row, question.text] for question in questions]

    def clips(self) -> dict[str, Clip]:
        """The CLIPs to measure: `trained`, and `untrained` where there is one.

        Raises:
            ConfigError: there is no CLIP.
        """
        if self.clip is None:
            raise ConfigError("this evaluation needs a CLIP: set the stage's `clip`, or leave the task out of `tasks`")
        return {"trained": self.clip} | ({"untrained": self.untrained_clip} if self.untrained_clip else {})

    def vlms(self) -> dict[str, Vlm]:
        """The vision-language models to measure: `trained`, and `untrained` where there is one.

        Raises:
            ConfigError: there is no vision-language model.
        """
        if self.vlm is None:
            raise ConfigError("this evaluation needs a vision-language model: set the stage's `vlm`")
        return {"trained": self.vlm} | ({"untrained": self.untrained_vlm} if self.untrained_vlm else {})


class EvalTask(Config):
    """Settings of one evaluation, and how to run it."""

    task: str = Field(description="name of the evaluation, as `mmfoundry list eval` prints it")

    needs: ClassVar[Literal["clip", "vlm"]]

    @abstractmethod
    def run(self, name: str, bench: Bench) -> TaskResult:
        """Measure the models of `bench`; `name` is the entry's name in the suite and starts its metric names."""


EVAL_TASKS: Registry[type[EvalTask]] = Registry("eval task", "mmfoundry.eval", package="mmfoundry.evals")


def gather_rows(mine: Tensor, total: int, runtime: Runtime) -> Tensor:
    """Bring together rows that were dealt out one by one: rank r holds rows r, r + W, r + 2W, ...

    Args:
        mine: this rank's rows (ceil or floor of total / W, ...).
        total: rows on all ranks.
        runtime: this process's place.

    Returns:
        (total, ...) in the original order, the same on every rank.
    """
    world = runtime.world_size
    rows_each = -(-total // world)
    padded = torch.cat([mine, mine.new_zeros(rows_each - len(mine), *mine.shape[1:])])
    gathered = all_gather_rows(padded, runtime.group)
    return gathered.unflatten(0, (world, rows_each)).transpose(0, 1).flatten(0, 1)[:total]


def joint_rows(mine: NDArray[np.float64], runtime: Runtime) -> NDArray[np.float64]:
    """Rows of which each is one rank's, and zero on all others, put together; exact, the same on every rank."""
    if runtime.group is None:
        return mine
    joint = torch.from_numpy(mine).to(runtime.device)
    dist.all_reduce(joint, group=runtime.group)
    summed: NDArray[np.float64] = joint.cpu().numpy()
    return summed
