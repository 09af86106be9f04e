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

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn

from mmfoundry.pipeline import checkpoint, ema
from mmfoundry.pipeline.engine import Engine, Objective
from mmfoundry.pipeline.engine_config import zero_stage
from mmfoundry.pipeline.errors import PREEMPTED_EXIT_CODE, ConfigError
from mmfoundry.pipeline.gauges import Gauges, Work
from mmfoundry.pipeline.grad_cache import Batch
from mmfoundry.pipeline.guard import Guard, GuardConfig, NonFinite
from mmfoundry.pipeline.heartbeat import Doing, Heartbeat
from mmfoundry.pipeline.measured import Measured
from mmfoundry.pipeline.optimizers import ParamGroup, build_optimizer, decay_groups
from mmfoundry.pipeline.rng import rng_state, set_rng_state
from mmfoundry.pipeline.schedules import lr_factor
from mmfoundry.pipeline.signals import listening
from mmfoundry.pipeline.stage import CHECKPOINTS, RunContext
from mmfoundry.pipeline.trainer_config import TrainerConfig, steps_of
from mmfoundry.pipeline.updates import Updates


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
    evaluate: Callable[[Any, int], Mapping[str, float]] | None = None,
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
        evaluate: called with the model, its weights whole and in eval mode, and the step, every `eval_steps` steps,
            without gradients, on every rank; where an average of the weights is kept, then again with that.
        work: what a micro-batch costs one rank, for tokens and operations a second in the log.
    Raises:
        ConfigError: `eval_steps` where nothing is evaluated.
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
        evaluate: Callable[[Any, int], Mapping[str, float]] | None,
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
        self.told_to_stop = False
        self.evaluated: tuple[int, dict[str, float]] = (0, {})  # the last evaluation, and its step
        self.best_so_far: float | None = None
        self.best: checkpoint.Best | None = None
        if config.metric_for_best_model is not None:
            self.best = checkpoint.Best(config.metric_for_best_model, config.greater_is_better)
        self.saving: checkpoint.Saving | None = None
        self.recent: deque[float] = deque(maxlen=max(1, self.steps // 20))

        if config.eval_steps and evaluate is None:
            raise ConfigError(f"{phase}: eval_steps is {config.eval_steps}, but no evaluation is given: leave it at 0")

    def run(self, param_groups: list[ParamGroup] | None) -> TrainResult:
        self.preemption = _Preemption()
        with listening(self.preemption.ask):  # from here on a signal ends in a checkpoint, also while all is built
            return self._run(param_groups)

    def _run(self, param_groups: list[ParamGroup] | None) -> TrainResult:
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
        if config.scheduler.warmup_steps >= self.steps:
            warmup = f"{config.scheduler.warmup_steps} warmup_steps, of {self.steps} steps"
            self.context.log.say(f"{self.phase}: {warmup}: the learning rate rises to the end and never falls")
        groups = param_groups or decay_groups(self.model.named_parameters(), config.optimizer.weight_decay)
        stage = zero_stage(config, runtime.world_size)
        self.measured = Measured(self.model, partitioned=config.eval_steps > 0 and stage == 3)
        self.engine = Engine(
            config,
            self.model,
            self.objective,
            lambda groups: build_optimizer(groups, config.optimizer, stage),
            groups,
            runtime,
        )
        self.ema = ema.Ema(config.ema, self.engine.base_optimizer) if config.ema is not None else None
        self.updates = Updates(config, self.engine, self.objective, self.guard, self.heart, runtime)
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
        with (
            self.heart,
            self.context.progress(self.steps, self.phase, "steps") as self.bar,
        ):
            self.bar.advance(progress.step)
            self._restart_clock()
            while progress.step < self.steps:
                queued = self.updates.queue(progress.step + 1, self._fetch(batches), self.preemption.asked)
                self._settle()  # the step before, while the device is at this one
                self.updates.update(queued, self._before_update)
                progress.step += 1
                progress.samples += config.train_batch_size
                evaluates = self.evaluate is not None and self._is_nth(config.eval_steps)
                done, due = progress.step == self.steps, self._is_nth(config.save_steps)
                if self.updates.waits or evaluates or due or self.told_to_stop or self._is_point(progress.step):
                    self._settle()
                if self.evaluate is not None and evaluates:
                    self._evaluate(self.evaluate)
                stop = self.told_to_stop
                if self._is_best() or stop or done or due:
                    self._save()
                if stop or done:
                    self._wait_for_checkpoint()
                if stop:
                    self.context.log.say(
                        f"{self.phase}: told to stop; saved at step {progress.step}, run again to go on"
                    )
                    self.context.log.close()
                    raise SystemExit(PREEMPTED_EXIT_CODE)

    def _is_nth(self, steps: int) -> bool:
        """Whether what is done every so many steps is due; 0 stands for never."""
        return steps > 0 and self.progress.step % steps == 0

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

    def _before_update(self) -> float:
        """Take the norms where they are logged; what the learning rates are multiplied with in the step to come."""
        if self._is_point(self.progress.step + 1):
            self.gauges.before_update(self.engine)
        if self.ema is not None:
            self.ema.at(self.progress.step)
        return lr_factor(self.config.scheduler, self.progress.step, self.steps) * self.guard.caution

    def _settle(self) -> None:
        """Read and log the numbers of the last step, if that is still to be done."""
        made = self.updates.settle()
        if made is None:
            return
        if made.learnt:
            self.recent.append(made.numbers["loss"])
        self.progress.skipped_steps += made.skipped
        self.told_to_stop |= made.stop
        self._log(made.numbers)
        self.bar.advance(note=f"loss {made.numbers['loss']:.4f}")

    def _log(self, numbers: dict[str, float]) -> None:
        step = self.progress.step
        line = numbers | {"lr": self.engine.lr}
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

    def _evaluate(self, evaluate: Callable[[Any, int], Mapping[str, float]]) -> None:
        self.heart.at(self.progress.step, Doing.EVALUATION)
        numbers: dict[str, float] = {}
        looks: dict[str, str | None] = {"": None} if self.ema is None else {"": None, f"/{ema.KEY}": ema.KEY}
        for suffix, state in looks.items():
            drawn = rng_state(self.runtime.device)
            with torch.no_grad(), self.measured.whole(self.engine, state) as model:
                found = evaluate(model, self.progress.step)
            set_rng_state(drawn, self.runtime.device)  # what an evaluation draws must not change the training
            numbers |= {f"{name}{suffix}": value for name, value in found.items()}
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
    """Turns the signals by which schedulers announce the end into a question the loop asks."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
