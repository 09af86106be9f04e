"""The one training loop: a stage brings model, objective, data and parameter groups; the rest is here.

The loss contract. `objective(output, batch, group)` returns `loss` such that its mean over ranks is the joint loss of
one micro-batch. Where a step has several micro-batches, they count alike, unless the objective has a method
`weight(batch)`: what this rank's micro-batch counts for (answer tokens, say), read on the host before the batch goes
to the device. Weights are summed over ranks and micro-batches before the first forward pass, so that any split of the
same samples into ranks and micro-batches gives the same loss and gradient. An objective of several parts, of which some
count like that, has `weights(batch)` instead, part -> number, and is handed each part's factor (1 on average) in the
batch, as 0-d tensors under `loss_weights`: it multiplies by itself.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmfoundry.pipeline import checkpoint
from mmfoundry.pipeline.ema import Ema
from mmfoundry.pipeline.engine import Engine, Objective
from mmfoundry.pipeline.engine_config import zero_stage
from mmfoundry.pipeline.errors import PREEMPTED_EXIT_CODE, ConfigError
from mmfoundry.pipeline.gauges import Gauges, Work
from mmfoundry.pipeline.grad_cache import Batch
from mmfoundry.pipeline.guard import NON_FINITE, Guard, GuardConfig, NonFinite
from mmfoundry.pipeline.heartbeat import Doing, Heartbeat
from mmfoundry.pipeline.metrics import Tally
from mmfoundry.pipeline.optimizers import ParamGroup, build_optimizer, decay_groups
from mmfoundry.pipeline.schedules import lr_factor
from mmfoundry.pipeline.stage import CHECKPOINTS, RunContext
from mmfoundry.pipeline.trainer_config import TrainerConfig, steps_of

WEIGHTS = "loss_weights"  # of a batch; see the loss contract


class DataLoader(Protocol):
    """What `train` wants of a loader: micro-batches of this rank without end, and its position as JSON values.

    For `max_epochs` it also has `epoch_samples`, the samples of a pass over its data.
    """

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present position on."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed out."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position, also one of another number of ranks; called before `__iter__`."""


@dataclass(frozen=True)
class TrainResult:
    """How a phase went, over all parts of an interrupted run.

    Attributes:
        steps: optimizer steps done.
        samples: samples seen, over all ranks.
        final_loss: joint loss of the last step.
        mean_loss: mean over the last twentieth of the steps, less noisy.
        seconds: wall time in the loop, evaluations included, checkpoints left out.
        samples_per_second: `samples` over `seconds`.
        data_wait_share: fraction of `seconds` that rank 0 waited for data.
    """

    steps: int
    samples: int
    final_loss: float
    mean_loss: float
    seconds: float
    samples_per_second: float
    data_wait_share: float

    def as_metrics(self) -> dict[str, float]:
        """As headline numbers of a stage; the final loss is `loss`."""
        numbers = {name: float(value) for name, value in asdict(self).items()}
        return {"loss": numbers.pop("final_loss"), **numbers}


def train(
    config: TrainerConfig,
    *,
    model: nn.Module,
    objective: Objective,
    loader: DataLoader,
    context: RunContext,
    phase: str = "train",
    param_groups: list[ParamGroup] | None = None,
    metrics: Callable[[], Mapping[str, float]] | None = None,
    evaluate: Callable[[int], Mapping[str, float]] | None = None,
    work: Callable[[Mapping[str, Any]], Work] | None = None,
) -> TrainResult:
    """Train for the steps of the config's budget, going on from the newest complete checkpoint in the work folder.

    Args:
        config: of the phase.
        model: `model(batch)` gives what `objective` reads. Only parameters that require gradients are trained and
            checkpointed; after the call the model holds the final weights, whole, on every rank.
        objective: see the loss contract above.
        loader: built with `batch_size=config.samples_per_fetch(world_size)`.
        context: of the running stage; checkpoints go to `work/checkpoints/<phase>`.
        phase: name of this phase in files and logs.
        param_groups: from `decay_groups`; None: all trainable parameters, vectors not decayed.
        metrics: more numbers for the log, asked for every `logging_steps` steps.
        evaluate: called with the step every `eval_steps` steps, in eval mode without gradients, on every rank.
        work: what a micro-batch costs one rank, for tokens and operations a second in the log.
    Raises:
        NonFinite: a loss or gradient is not finite; the step and the samples are named.
        LossSpike: a loss is far above the last ones, where `config.guard` looks for that.
        NotEnoughSpace: no room for a checkpoint; the previous one is intact.
        LostRank: another rank hangs or is gone.
        SystemExit: code 85 after SIGTERM or SIGUSR1; a checkpoint was written.
    """
    return _Training(config, model, objective, loader, context, phase, metrics, evaluate, work).run(param_groups)


@dataclass
class _Progress:
    """What a checkpoint remembers of the loop itself."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0
    skipped_steps: int = 0  # in fp16 the loss scale was too high, or the guard left them out


class _Training:
    def __init__(
        self,
        config: TrainerConfig,
        model: nn.Module,
        objective: Objective,
        loader: DataLoader,
        context: RunContext,
        phase: str,
        metrics: Callable[[], Mapping[str, float]] | None,
        evaluate: Callable[[int], Mapping[str, float]] | None,
        work: Callable[[Mapping[str, Any]], Work] | None,
    ) -> None:
        self.config, self.model, self.objective, self.loader = config, model, objective, loader
        self.context, self.phase, self.metrics, self.evaluate = context, phase, metrics, evaluate
        self.runtime = context.runtime
        self.gauges = Gauges(model, self.runtime, config.precision, work)
        self.folder = context.work / CHECKPOINTS / phase
        self.steps = steps_of(config, loader)
        self.accumulation = config.micro_batches(self.runtime.world_size)[1]
        self.guard = Guard(config.guard, self.runtime, context.work, phase, context.log.say)
        self.heart = Heartbeat(config.heartbeat, self.runtime, context.work)
        self.progress = _Progress()
        self.evaluated: tuple[int, dict[str, float]] = (0, {})  # the last evaluation, and its step
        self.best_so_far: float | None = None
        self.best: checkpoint.Best | None = None
        if config.metric_for_best_model is not None:
            self.best = checkpoint.Best(config.metric_for_best_model, config.greater_is_better)
        self.saving: checkpoint.Saving | None = None
        self.recent: deque[float] = deque(maxlen=max(1, self.steps // 20))

    def run(self, param_groups: list[ParamGroup] | None) -> TrainResult:
        self.model.to(self.runtime.device)
        found = checkpoint.newest(self.folder, self.runtime, self.context.log.say)
        if found is not None:
            found.load_model(self.model)
            self.progress = _Progress(**found.state["progress"])
            self.recent.extend(found.state["recent_losses"])
            self.best_so_far = found.state.get("best_so_far")
            if "guard" in found.state:  # not in those of earlier releases
                self.guard.load_state_dict(found.state["guard"])
            self.loader.load_state_dict(found.state["loader"])
            self.context.log.say(f"{self.phase}: goes on from the checkpoint of step {found.step}")
        self.context.log.rewind(self.phase, self.progress.step)
        if self.progress.step < self.steps:
            self._fit(found, param_groups)
        found = checkpoint.best_of(self.folder, self.best, self.runtime) if self.best is not None else None
        if self.config.load_best_model_at_end and found is not None:
            found.load_model(self.model)
            self.context.log.say(f"{self.phase}: ends with the weights of step {found.step}, the best")
        return self._result()

    def _fit(self, found: checkpoint.Checkpoint | None, param_groups: list[ParamGroup] | None) -> None:
        config, runtime = self.config, self.runtime
        groups = param_groups or decay_groups(self.model.named_parameters(), config.optimizer.weight_decay)
        stage = zero_stage(config, runtime.world_size)
        self.engine = Engine(
            config,
            self.model,
            self.objective,
            lambda groups: build_optimizer(groups, config.optimizer, stage),
            groups,
            runtime,
        )
        self.ema = Ema(config.ema, self.engine.base_optimizer) if config.ema is not None else None
        with ExitStack() as on_error, ExitStack() as at_end:
            on_error.callback(self.engine.abandon)
            checkpoint.check_place(self.folder, self.engine, runtime)
            if found is not None:
                found.load_optimizer(self.engine)
            batches = iter(self.loader)
            if isinstance(batches, Generator):
                at_end.callback(batches.close)  # ends the loader's threads now, not when the collector finds them
            if found is not None:  # last: what is built above may have drawn numbers
                found.restore_rng(runtime, self.context.config.seed)
            self.model.train()
            self._loop(batches)
            on_error.pop_all()
        self.engine.close()

    def _loop(self, batches: Iterator[Batch]) -> None:
        config, progress = self.config, self.progress
        bar = self.context.progress(self.steps, self.phase, "steps")
        with self.heart, _Preemption() as preemption, bar as shown:
            shown.advance(progress.step)
            self._restart_clock()
            while progress.step < self.steps:
                micro_batches = self._fetch(batches)
                joint = self._update(micro_batches, preemption.asked)
                stop = joint.pop("stop") > 0
                self._log(joint)
                if self.evaluate is not None and config.eval_steps and progress.step % config.eval_steps == 0:
                    self._evaluate(self.evaluate)
                done = progress.step == self.steps
                due = config.save_steps and progress.step % config.save_steps == 0
                if self._is_best() or stop or done or due:
                    self._save()
                if stop or done:
                    self._wait_for_checkpoint()
                shown.advance(note=f"loss {joint['loss']:.4f}")
                if stop:
                    self.context.log.say(
                        f"{self.phase}: told to stop; saved at step {progress.step}, run again to go on"
                    )
                    self.context.log.close()
                    raise SystemExit(PREEMPTED_EXIT_CODE)

    def _fetch(self, batches: Iterator[Batch]) -> list[Batch]:
        """The step's micro-batches, still on the host."""
        self.heart.at(self.progress.step + 1, Doing.DATA)
        start = time.perf_counter()
        fetched = [next(batches) for _ in range(self.accumulation)]
        waited = time.perf_counter() - start
        self.progress.waited_s += waited
        self._window_waited_s += waited
        self.gauges.count(fetched)
        return fetched

    def _update(self, batches: list[Batch], stop: bool) -> dict[str, float]:
        """One optimizer step; the joint loss and metrics, and whether any rank was told to stop."""
        device, step = self.runtime.device, self.progress.step + 1
        self.heart.at(step, Doing.LOSSES)
        asked = torch.tensor(float(stop), device=device)
        tally = Tally()
        losses = []
        parts = self._part_weights(batches)
        for batch, own, weight in zip(batches, parts, self._micro_weights(batches), strict=True):
            values = self.engine.accumulate({**to_device(batch, device), **own}, weight)
            losses.append(values["loss"])
            tally.add(values | {"stop": asked}, 1.0 if weight is None else weight)
        self.heart.at(step, Doing.JOINING)
        joint = tally.means(self.runtime.group)  # the one wait for the device before the update
        self.heart.at(step, Doing.UPDATE)
        norm = self._step(joint["loss"], batches, losses)
        self.progress.step += 1
        self.progress.samples += self.config.train_batch_size
        return joint | {"grad_norm": norm}

    def _step(self, loss: float, batches: list[Batch], losses: list[Tensor]) -> float:
        """Update the weights, unless the guard has something against it; the norm of the gradient."""
        step = self.progress.step + 1
        trouble = self.guard.trouble(loss)
        if trouble is not None:
            self.guard.answer(trouble, "loss", loss, step, batches, losses)
            self.engine.discard()
            self.progress.skipped_steps += 1
            return math.nan
        if self._is_point(step):
            self.gauges.before_update(self.engine.stage, self.engine.loss_scale)
        if self.ema is not None:
            self.ema.at(self.progress.step)
        factor = lr_factor(self.config.scheduler, self.progress.step, self.steps)
        norm = self.engine.step(factor * self.guard.caution)
        self.recent.append(loss)
        if math.isfinite(norm):
            self.guard.accept(loss)
            return norm
        if self.config.precision != "fp16" or self.engine.loss_scale <= 1.0:
            self.guard.answer(NON_FINITE, "gradient", norm, step, batches, losses)
        self.progress.skipped_steps += 1
        return norm

    def _micro_weights(self, batches: list[Batch]) -> list[Tensor | None]:
        """What each micro-batch's joint loss is multiplied with, 1 on average; None stands for 1."""
        weight_of = getattr(self.objective, "weight", None)
        if weight_of is None or len(batches) == 1:
            return [None] * len(batches)
        return list(self._shares([[float(weight_of(batch)) for batch in batches]])[0])

    def _part_weights(self, batches: list[Batch]) -> list[Batch]:
        """What each micro-batch is handed beside its samples: the factors of the objective's parts, if it has such."""
        weights_of = getattr(self.objective, "weights", None)
        counted = [weights_of(batch) for batch in batches] if weights_of is not None and len(batches) > 1 else [{}]
        if not counted[0]:
            return [{}] * len(batches)
        shares = self._shares([[float(each[part]) for each in counted] for part in counted[0]])
        return [{WEIGHTS: dict(zip(counted[0], own, strict=True))} for own in shares.T]

    def _shares(self, counts: list[list[float]]) -> Tensor:
        """Rows of what micro-batches count for on this rank, as factors of the joint losses: 1 on average, fp32."""
        weights = torch.tensor(counts, dtype=torch.float64).to(self.runtime.device)
        if self.runtime.group is not None:
            dist.all_reduce(weights, group=self.runtime.group)
        total = weights.sum(1, keepdim=True)
        # A step without any weight (no answer token in it) has loss and gradient zero whatever the factor is.
        return torch.where(total > 0, weights * weights.shape[1] / total, torch.ones_like(weights)).float()

    def _log(self, joint: dict[str, float]) -> None:
        step = self.progress.step
        line = joint | {"lr": self.engine.lr}
        if self.config.precision == "fp16":
            line |= {"loss_scale": self.engine.loss_scale}
        if self.config.precision == "fp16" or self.config.guard != GuardConfig():
            line |= {"skipped_steps": self.progress.skipped_steps}
        point = self._is_point(step)
        if point:
            seconds = max(time.perf_counter() - self._window_start, 1e-9)
            samples = (step - self._window_step) * self.config.train_batch_size
            line |= {"samples_per_second": samples / seconds, "data_wait_share": self._window_waited_s / seconds}
            line |= self.gauges.read(seconds, self.engine.deepspeed.optimizer.param_groups)
            line |= self.metrics() if self.metrics is not None else {}
            self._restart_window()
        self.context.log.scalars(step, line, self.phase, tensorboard=point)

    def _is_point(self, step: int) -> bool:
        """Whether the log gets what costs something to read."""
        return step % self.config.logging_steps == 0 or step == self.steps

    def _evaluate(self, evaluate: Callable[[int], Mapping[str, float]]) -> None:
        self.heart.at(self.progress.step, Doing.EVALUATION)
        self.model.eval()
        with torch.no_grad():
            numbers = evaluate(self.progress.step)
        self.model.train()
        self.evaluated = (self.progress.step, {name: float(value) for name, value in numbers.items()})
        named = {f"eval/{name}": value for name, value in numbers.items()}
        self.context.log.scalars(self.progress.step, named, self.phase)
        self._restart_window()

    def _is_best(self) -> bool:
        """Whether this step was evaluated, and better than all before it."""
        if self.best is None or self.evaluated[0] != self.progress.step:
            return False
        if self.best.metric not in self.evaluated[1]:
            known = ", ".join(sorted(self.evaluated[1]))
            raise ConfigError(f"metric_for_best_model: no evaluation gives {self.best.metric}; there are: {known}")
        value = self.best.of({"metrics": self.evaluated[1]})
        if value is None or (self.best_so_far is not None and value <= self.best_so_far):
            return False
        self.best_so_far = value
        return True

    def _save(self) -> None:
        self.heart.at(self.progress.step, Doing.CHECKPOINT)
        self._stop_clock()
        self.context.log.flush()
        state = {
            "step": self.progress.step,
            "progress": asdict(self.progress),
            "recent_losses": list(self.recent),
            "guard": self.guard.state_dict(),
            "best_so_far": self.best_so_far,
            "metrics": self.evaluated[1] if self.evaluated[0] == self.progress.step else {},
            "loader": self.loader.state_dict(),
        }
        self._wait_for_checkpoint()
        config = self.config
        self.saving = checkpoint.save(
            self.folder, self.engine, state, config.keep_checkpoints, self.runtime, self.best, config.save_async
        )
        self._restart_clock()

    def _wait_for_checkpoint(self) -> None:
        if self.saving is not None:
            self.saving.wait()
            self.saving = None

    def _restart_clock(self) -> None:
        self._clock = time.perf_counter()
        self._restart_window()

    def _stop_clock(self) -> None:
        self.progress.seconds += time.perf_counter() - self._clock

    def _restart_window(self) -> None:
        """Begin anew to count for `samples_per_second`; checkpoints and evaluations are left out of it."""
        self._window_start = time.perf_counter()
        self._window_step = self.progress.step
        self._window_waited_s = 0.0
        self.gauges.restart()

    def _result(self) -> TrainResult:
        done = self.progress
        if not self.recent:
            raise NonFinite(f"{self.phase}: not one of {done.step} steps had a loss to learn from")
        seconds = max(done.seconds, 1e-9)
        return TrainResult(
            steps=done.step,
            samples=done.samples,
            final_loss=self.recent[-1],
            mean_loss=sum(self.recent) / len(self.recent),
            seconds=seconds,
            samples_per_second=done.samples / seconds,
            data_wait_share=done.waited_s / seconds,
        )


class _Preemption:
    """Turns SIGTERM and SIGUSR1, by which schedulers announce the end, into a question the loop asks."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __enter__(self) -> _Preemption:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def to_device(value: Any, device: torch.device) -> Any:
    """A batch with its tensors, at any depth of dicts, lists and tuples, on `device`; the rest as it is."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: to_device(part, device) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(part, device) for part in value)
    return value
