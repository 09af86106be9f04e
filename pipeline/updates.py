"""Optimizer steps that the host queues and reads later, so that it does not wait for the device in each of them.

A step is queued whole: forward and backward pass, the joint loss, the update. Whether the update is made is decided on
the device, by joint loss and gradient, so that nothing that is not finite touches the weights; the host reads a step's
numbers while the device is at the next one, and stops the run before that one's update. Where more is asked for than
to stop (fp16's loss scale follows each gradient; a guard may leave steps out or look for spikes) the host decides, and
waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.engine import Engine, Objective
from mmfoundry.pipeline.grad_cache import Batch
from mmfoundry.pipeline.guard import KEYS, NON_FINITE, Guard
from mmfoundry.pipeline.heartbeat import Doing, Heartbeat
from mmfoundry.pipeline.metrics import Reading, Tally
from mmfoundry.pipeline.trainer_config import TrainerConfig

GRAD_NORM, STOP = "grad_norm", "stop"
WEIGHTS = "loss_weights"  # of a batch; see the loss contract of the trainer


@dataclass(frozen=True)
class Queued:
    """An optimizer step whose gradient is on its way.

    Attributes:
        step: its number, from 1.
        samples: this rank's micro-batches, of which the samples' keys are kept only.
        losses: this rank's, () each, one a micro-batch.
        joint: loss and metrics over all ranks, () each, and whether any rank was told to stop.
    """

    step: int
    samples: list[Batch]
    losses: list[Tensor]
    joint: dict[str, Tensor]


@dataclass(frozen=True)
class Made:
    """An optimizer step that the host knows the end of.

    Attributes:
        numbers: loss and metrics over all ranks, and `grad_norm`.
        learnt: whether its loss is one to go by: finite, and no spike.
        skipped: whether its update was left out.
        stop: whether any rank was told to stop.
    """

    numbers: dict[str, float]
    learnt: bool
    skipped: bool
    stop: bool


class Updates:
    """Makes one optimizer step after the other: `queue`, then `update`, and `settle` at any time after that.

    Args:
        config: of the phase.
        engine: forward, backward and step.
        objective: its `weight`, if it has one, says what a micro-batch counts for.
        guard: what to do about steps that would spoil the weights.
        heart: is told what this rank is at.
        runtime: this process among the ranks.

    Attributes:
        waits: whether the host decides about each update, and so waits for the device.
    """

    def __init__(
        self,
        config: TrainerConfig,
        engine: Engine,
        objective: Objective,
        guard: Guard,
        heart: Heartbeat,
        runtime: Runtime,
    ) -> None:
        self._engine, self._objective, self._guard = engine, objective, guard
        self._heart, self._runtime = heart, runtime
        self._fp16 = config.precision == "fp16"
        self.waits = self._fp16 or guard.decides_on_the_host
        self._pending: tuple[Queued, Reading] | None = None
        self._made: Made | None = None

    def queue(self, step: int, batches: Sequence[Batch], stop: bool) -> Queued:
        """Forward and backward pass of a step.

        Args:
            step: its number, from 1.
            batches: this rank's micro-batches.
            stop: whether this rank was told to stop.
        """
        device = self._runtime.device
        self._heart.at(step, Doing.LOSSES)
        asked = torch.full((), float(stop), device=device)
        tally, losses, parts = Tally(), [], self._part_weights(batches)
        for batch, own, weight in zip(batches, parts, self._micro_weights(batches), strict=True):
            values = self._engine.accumulate({**to_device(batch, device), **own}, weight)
            losses.append(values["loss"])
            tally.add(values | {STOP: asked}, 1.0 if weight is None else weight)
        self._heart.at(step, Doing.JOINING)
        samples = [{KEYS: batch.get(KEYS, ())} for batch in batches]
        return Queued(step, samples, losses, tally.means(self._runtime.group))

    def update(self, queued: Queued, before: Callable[[], float]) -> None:
        """Update the weights, unless the loss, the gradient or the guard has something against it.

        Args:
            queued: from `queue`; the step before it is settled.
            before: called if there is to be an update; gives what the learning rates are multiplied with.
        """
        if not self.waits:
            self._heart.at(queued.step, Doing.UPDATE)
            norm = self._engine.step(before(), queued.joint["loss"].isfinite())
            self._pending = queued, Reading(queued.joint | {GRAD_NORM: norm})
            return
        numbers = Reading(queued.joint).numbers()
        self._heart.at(queued.step, Doing.UPDATE)
        if self._is_refused(queued, numbers["loss"]):
            self._engine.discard()
            stop = numbers.pop(STOP) > 0
            self._made = Made(numbers | {GRAD_NORM: math.nan}, learnt=False, skipped=True, stop=stop)
        else:
            self._made = self._judged(queued, numbers | {GRAD_NORM: float(self._engine.step(before()))})

    def settle(self) -> Made | None:
        """The last updated step, once; None if it was settled before.

        Raises:
            NonFinite: its loss or gradient is not finite; the weights are those from before it.
            LossSpike: from `update` as well: its loss is far above the last ones.
        """
        if self._pending is not None:
            (queued, reading), self._pending = self._pending, None
            numbers = reading.numbers()
            self._is_refused(queued, numbers["loss"])  # by a guard that can only stop
            self._made = self._judged(queued, numbers)
        made, self._made = self._made, None
        return made

    def _is_refused(self, queued: Queued, loss: float) -> bool:
        trouble = self._guard.trouble(loss)
        if trouble is not None:
            self._guard.answer(trouble, "loss", loss, queued.step, queued.samples, queued.losses)
        return trouble is not None

    def _judged(self, queued: Queued, numbers: dict[str, float]) -> Made:
        norm, stop = numbers[GRAD_NORM], numbers.pop(STOP) > 0
        finite = math.isfinite(norm)
        if finite:
            self._guard.accept(numbers["loss"])
        elif not self._fp16 or self._engine.loss_scale <= 1.0:
            self._guard.answer(NON_FINITE, "gradient", norm, queued.step, queued.samples, queued.losses)
        return Made(numbers, learnt=True, skipped=not finite, stop=stop)

    def _micro_weights(self, batches: Sequence[Batch]) -> list[Tensor | None]:
        """What each micro-batch's joint loss is multiplied with, 1 on average; None stands for 1."""
        weight_of = getattr(self._objective, "weight", None)
        if weight_of is None or len(batches) == 1:
            return [None] * len(batches)
        return list(self._shares([[float(weight_of(batch)) for batch in batches]])[0])

    def _part_weights(self, batches: Sequence[Batch]) -> list[Batch]:
        """What each micro-batch is handed beside its samples: the factors of the objective's parts, if it has such."""
        weights_of = getattr(self._objective, "weights", None)
        counted = [weights_of(batch) for batch in batches] if weights_of is not None and len(batches) > 1 else [{}]
        if not counted[0]:
            return [{}] * len(batches)
        shares = self._shares([[float(each[part]) for each in counted] for part in counted[0]])
        return [{WEIGHTS: dict(zip(counted[0], own, strict=True))} for own in shares.T]

    def _shares(self, counts: list[list[float]]) -> Tensor:
        """Rows of what micro-batches count for on this rank, as factors of the joint losses: 1 on average, fp32."""
        weights = torch.tensor(counts, dtype=torch.float64).to(self._runtime.device, non_blocking=True)
        if self._runtime.group is not None:
            dist.all_reduce(weights, group=self._runtime.group)
        total = weights.sum(1, keepdim=True)
        # A step without any weight (no answer token in it) has loss and gradient zero whatever the factor is.
        return torch.where(total > 0, weights * weights.shape[1] / total, torch.ones_like(weights)).float()


def to_device(value: Any, device: torch.device) -> Any:
    """A batch with its tensors, at any depth of dicts, lists and tuples, on `device`; the rest as it is."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: to_device(part, device) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(part, device) for part in value)
    return value
