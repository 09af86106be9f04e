"""What a training phase is told: budget, optimizer, evaluations, checkpoints."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from mmfoundry.pipeline.config import Neutral
from mmfoundry.pipeline.ema import KEY as AVERAGE
from mmfoundry.pipeline.ema import EmaConfig
from mmfoundry.pipeline.engine_config import EngineConfig
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.guard import GuardConfig
from mmfoundry.pipeline.heartbeat import HeartbeatConfig
from mmfoundry.pipeline.optimizers import OptimizerConfig, looks_at_whole_tensors
from mmfoundry.pipeline.schedules import SchedulerConfig


class TrainerConfig(EngineConfig):
    """One training phase. Budgets are in steps or samples, so that results do not depend on a machine's speed."""

    max_steps: int | None = Field(
        None, gt=0, description="optimizer steps of the phase; either this, `max_samples` or `max_epochs`"
    )
    max_samples: int | None = Field(None, gt=0, description="samples seen in the phase, over all ranks, in whole steps")
    max_epochs: float | None = Field(
        None, gt=0, description="passes over the data, in whole steps; of one source, or of several with upsampling"
    )
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="how gradients become updates")
    scheduler: SchedulerConfig = Field(SchedulerConfig(), description="how the learning rate moves")
    ema: EmaConfig | None = Field(None, description="a moving average of the weights, kept beside them; None: none")
    guard: GuardConfig = Field(GuardConfig(), description="what to do about steps that would spoil the weights")
    heartbeat: Annotated[HeartbeatConfig, Neutral()] = Field(
        HeartbeatConfig(), description="when a rank counts as lost, and the others end"
    )
    eval_steps: int = Field(0, ge=0, description="optimizer steps between evaluations; 0: none while training")
    save_steps: Annotated[int, Neutral()] = Field(
        500, ge=0, description="optimizer steps between checkpoints; 0: one at the end only"
    )
    keep_checkpoints: Annotated[int, Neutral()] = Field(2, gt=0, description="newest checkpoints left on the disk")
    metric_for_best_model: Annotated[str | None, Neutral()] = Field(
        None, description="an evaluation's number, by which one more checkpoint is kept, the best; None: none is"
    )
    greater_is_better: Annotated[bool, Neutral()] = Field(False, description="of metric_for_best_model")
    load_best_model_at_end: bool = Field(
        False, description="the phase ends with the weights of the best checkpoint, not of the last step"
    )
    save_async: Annotated[bool, Neutral()] = Field(
        False, description="write checkpoints beside the next steps, where the host has memory for a copy of them"
    )
    logging_steps: Annotated[int, Neutral()] = Field(
        10, gt=0, description="optimizer steps between points in TensorBoard; metrics.jsonl has every step's loss"
    )

    @model_validator(mode="after")
    def _one_budget(self) -> TrainerConfig:
        given = [name for name in ("max_steps", "max_samples", "max_epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of max_steps, max_samples and max_epochs; given: {', '.join(given) or 'none'}")
        return self

    @model_validator(mode="after")
    def _keeps_whole_tensors_off_the_disk(self) -> TrainerConfig:
        if self.zero_optimization.offload_optimizer.device == "nvme" and looks_at_whole_tensors(self.optimizer.type):
            raise ValueError(
                f"optimizer.type {self.optimizer.type} looks at whole tensors and does not go with "
                "zero_optimization.offload_optimizer.device nvme; set that to cpu, or take adamw, adan or lion"
            )
        return self

    @model_validator(mode="after")
    def _measures_what_is_best(self) -> TrainerConfig:
        if self.metric_for_best_model is not None and not self.eval_steps:
            raise ValueError("metric_for_best_model needs eval_steps: nothing is evaluated while training")
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            raise ValueError("load_best_model_at_end needs metric_for_best_model")
        if self.load_best_model_at_end and str(self.metric_for_best_model).rpartition("/")[2] == AVERAGE:
            raise ValueError(
                f"load_best_model_at_end ends with the training's own weights, and {self.metric_for_best_model} is the "
                f"average's: name the metric without /{AVERAGE}"
            )
        return self


def steps_of(config: TrainerConfig, loader: Any) -> int:
    """Optimizer steps of a phase, whichever of its budgets is given.

    Raises:
        ConfigError: the budget is less than one step, or the loader's sources have no common epoch.
    """
    if config.max_steps is not None:
        return config.max_steps
    samples = config.max_samples
    if config.max_epochs is not None:
        samples = round(config.max_epochs * loader.epoch_samples)
    steps = (samples or 0) // config.train_batch_size
    if steps < 1:
        raise ConfigError(f"{samples} samples are less than one step of train_batch_size {config.train_batch_size}")
    return steps
