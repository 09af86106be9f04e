"""Learning-rate schedules: pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from mmfoundry.pipeline.config import Config


class SchedulerConfig(Config):
    """How the learning rate moves over a training phase."""

    type: Literal["cosine", "constant", "warmup_stable_decay"] = Field(
        "cosine", description="after the warm-up: half a cosine, flat, or flat and a decay over the last steps"
    )
    warmup_steps: int = Field(0, ge=0, description="optimizer steps over which the rate rises linearly to its peak")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="where cosine and decay end, as a fraction of the peak")
    decay_steps: int = Field(0, ge=0, description="last optimizer steps, in which warmup_stable_decay goes down")
    decay_shape: Literal["1-sqrt", "linear"] = Field(
        "1-sqrt", description="how warmup_stable_decay goes down: by 1 - sqrt(share of the decay done), or linearly"
    )

    @model_validator(mode="after")
    def _decays(self) -> SchedulerConfig:
        if (self.type == "warmup_stable_decay") != (self.decay_steps > 0):
            raise ValueError("decay_steps (above 0) and type: warmup_stable_decay go together")
        return self


def lr_factor(config: SchedulerConfig, step: int, max_steps: int) -> float:
    """What the peak learning rate is multiplied with.

    Args:
        config: the schedule.
        step: optimizer steps done before this one, from 0.
        max_steps: steps of the whole phase.
    Returns:
        A factor in (0, 1]: 1 at the end of the warm-up; cosine and decay would reach `min_lr_ratio` at step
        `max_steps`.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.type == "constant":
        return 1.0
    if config.type == "warmup_stable_decay":  # Hagele et al. 2024, arXiv 2405.18392: 1 - sqrt ends lowest
        done = max(0.0, 1 - (max_steps - step) / config.decay_steps)
        left = 1 - (math.sqrt(done) if config.decay_shape == "1-sqrt" else done)
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * left
    done = (step - config.warmup_steps) / max(max_steps - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine
