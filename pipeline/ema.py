"""A moving average of the weights, kept with the optimizer's states: cut up, gathered and checkpointed as they are.

So it costs one more number a weight, shared out among the ranks from ZeRO stage 1 on, and a run goes on with it on any
number of ranks and at any stage.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmfoundry.pipeline.checkpoint import OPTIMIZER, Checkpoint
from mmfoundry.pipeline.config import Config
from mmfoundry.pipeline.errors import DamagedInput

KEY = "ema"


class EmaConfig(Config):
    """An exponential moving average of the weights."""

    decay: float = Field(gt=0, lt=1, description="share of the average that an optimizer step keeps, e.g. 0.9998")
    warmup: bool = Field(
        True, description="keep at most (1 + step) / (10 + step), so that the first weights are soon forgotten"
    )


class Ema:
    """Updates the average after every update of the weights; steps that are skipped leave it as it is.

    Args:
        config: how slowly it moves.
        optimizer: the torch optimizer that the engine drives.
    """

    def __init__(self, config: EmaConfig, optimizer: torch.optim.Optimizer) -> None:
        self._config = config
        self._keeps = config.decay
        optimizer.register_step_post_hook(self._update)

    def at(self, step: int) -> None:
        """Say which step comes next: how many are done."""
        early = (1 + step) / (10 + step) if self._config.warmup else 1.0
        self._keeps = min(self._config.decay, early)

    @torch.no_grad()
    def _update(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        weights, averages = [], []
        for group in optimizer.param_groups:
            for weight in group["params"]:
                state = optimizer.state.get(weight)
                if not state:  # not updated yet; a state of ours alone would keep the optimizer from making its own
                    continue
                if KEY not in state:
                    state[KEY] = weight.detach().clone()
                    continue
                weights.append(weight.detach())
                averages.append(state[KEY])
        if weights:
            torch._foreach_lerp_(averages, weights, 1 - self._keeps)


def averaged_weights(found: Checkpoint) -> dict[str, Tensor]:
    """The averages in a checkpoint, by parameter name; of trainable parameters only.

    Raises:
        DamagedInput: the file cannot be read.
    """
    path = found.path / OPTIMIZER
    try:
        with safe_open(path, framework="pt") as file:
            entries = [entry for entry in file.keys() if entry.endswith(f"/{KEY}")]  # noqa: SIM118
            return {entry.removesuffix(f"/{KEY}"): file.get_tensor(entry) for entry in entries}
    except (OSError, SafetensorError) as error:
        raise DamagedInput(f"{path}: not a readable safetensors file ({error})") from error
