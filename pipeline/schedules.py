"""Learning-rate schedules: pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from mmfoundry.pipeline.config import Config


class SchedulerConfig(Config):
    """How the learning rate moves over a training phase."""

    type: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up: half a cosine, or flat")
    warmup_steps: int = Field(0, ge=0, description="optimizer steps over which the rate rises linearly to its peak")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="where the cosine ends, as a fraction of the peak")


def lr_factor(config: SchedulerConfig, step: int, max_steps: int) -> float:
    """What the peak learning rate is multiplied with.

    Args:
        config: the schedule.
        step: optimizer steps done before this one, from 0.
        max_steps: steps of the whole phase.
    Returns:
        A factor in (0, 1]: 1 at the end of the warm-up; the cosine would reach `min_lr_ratio` at step `max_steps`.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.type == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(max_steps - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine
