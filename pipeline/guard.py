"""What happens when a loss or gradient is not finite, or a loss leaps up: stop, leave the step out, or go slower.

Every rank judges the joint loss, so that all decide alike. The samples of the step are named, whatever is done.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from mmfoundry.pipeline.artifact import write_atomic
from mmfoundry.pipeline.config import Config, Neutral
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.errors import MmfoundryError

KEYS = "__key__"  # in a batch: the samples' keys
KEYS_SHOWN = 8
NON_FINITE, SPIKE = "non_finite", "spike"


class GuardConfig(Config):
    """What to do about steps that would spoil the weights."""

    # Neutral: a run that has an end never stopped, so a stopped one may be told to go on.
    non_finite: Annotated[Literal["stop", "skip"], Neutral()] = Field(
        "stop", description="at a loss or gradient that is infinite or not a number: stop, or leave the update out"
    )
    spike: Literal["off", "skip", "back_off", "stop"] = Field(
        "off",
        description="at a loss far above the last ones: nothing, leave the update out, leave it out and lower the "
        "learning rate for a while, or stop",
    )
    spike_deviations: float = Field(
        6.0, gt=0, description="standard deviations of the last losses above their mean from which it is a spike"
    )
    spike_window_steps: int = Field(
        100, gt=1, description="optimizer steps that mean and deviation look back on; none is judged in the first ones"
    )
    back_off_factor: float = Field(0.5, gt=0, lt=1, description="what a spike multiplies the learning rate with")
    back_off_steps: int = Field(100, gt=0, description="optimizer steps in which the rate comes back, linearly")
    max_skipped_in_a_row: Annotated[int, Neutral()] = Field(
        10, ge=0, description="updates left out one after the other; at one more the run stops"
    )


class NonFinite(MmfoundryError):
    """A loss or gradient is infinite or not a number; raised on every rank before the weights are touched."""


class LossSpike(MmfoundryError):
    """A loss is far above the last ones; raised on every rank before the weights are touched."""


class Guard:
    """Judges every step of one training phase.

    Attributes:
        caution: what the learning rate is multiplied with; below 1 after a spike.
    """

    def __init__(
        self, config: GuardConfig, runtime: Runtime, folder: Path, phase: str, say: Callable[[str], None]
    ) -> None:
        self._config, self._runtime, self._folder, self._phase, self._say = config, runtime, folder, phase, say
        self.caution = 1.0
        self._mean = self._square = 0.0
        self._seen = self._in_a_row = 0

    @property
    def decides_on_the_host(self) -> bool:
        """Whether more is asked for than to stop at what is not finite, which the device itself leaves out."""
        return self._config.spike != "off" or self._config.non_finite != "stop"

    def trouble(self, loss: float) -> str | None:
        """What is wrong with a joint loss, `non_finite` or `spike`; None where nothing is."""
        if not math.isfinite(loss):
            return NON_FINITE
        config = self._config
        if config.spike == "off" or self._seen < config.spike_window_steps:
            return None
        variance = max(self._square - self._mean**2, 0.0)
        # A loss that has hardly moved would else call its own noise a spike.
        deviation = max(math.sqrt(variance), 1e-3 * abs(self._mean))
        return SPIKE if loss > self._mean + config.spike_deviations * deviation else None

    def accept(self, loss: float) -> None:
        """Take the loss of a step whose update was made among those that later ones are compared with."""
        self._in_a_row = 0
        self._seen += 1
        share = max(1 / self._seen, 1 / self._config.spike_window_steps)
        self._mean += share * (loss - self._mean)
        self._square += share * (loss**2 - self._square)
        if self.caution < 1.0:
            gain = (1 - self._config.back_off_factor) / self._config.back_off_steps
            self.caution = min(1.0, self.caution + gain)

    def answer(
        self, trouble: str, what: str, value: float, step: int, batches: list[dict[str, Any]], losses: list[Tensor]
    ) -> None:
        """Stop, or note that this step's update is left out; a collective.

        Args:
            trouble: `non_finite` or `spike`.
            what: that is in trouble: `loss` or `gradient`.
            value: of it, joint.
            step: that is being made, from 1.
            batches: this rank's micro-batches; their `__key__` is read only.
            losses: this rank's, one a micro-batch.

        Raises:
            NonFinite: `guard.non_finite` says stop, or too many updates in a row were left out.
            LossSpike: the same for `guard.spike`.
        """
        text = self._name_samples(trouble, what, value, step, batches, losses)
        action = self._config.non_finite if trouble == NON_FINITE else self._config.spike
        error = NonFinite if trouble == NON_FINITE else LossSpike
        begins_anew = "another optimizer.lr begins the run anew"
        if action == "stop":
            goes_on = "guard.non_finite=skip goes on from the last checkpoint and leaves such steps out"
            advice = f"{goes_on}; {begins_anew}" if trouble == NON_FINITE else f"another guard.spike and {begins_anew}"
            raise error(f"{text}; the weights were not touched: look at these samples; {advice}")
        self._in_a_row += 1
        if self._in_a_row > self._config.max_skipped_in_a_row:
            raise error(
                f"{text}; {self._in_a_row - 1} updates in a row were left out before it: look at these samples; "
                f"guard.max_skipped_in_a_row allows more, {begins_anew}"
            )
        if action == "back_off":
            self.caution *= self._config.back_off_factor
            text += f"; the learning rate is multiplied with {self.caution:.3g}"
        self._say(f"{text}; its update is left out")

    def _name_samples(
        self, trouble: str, what: str, value: float, step: int, batches: list[dict[str, Any]], losses: list[Tensor]
    ) -> str:
        """A sentence that names step, ranks and samples; all keys go to a file."""
        keys = [str(key) for batch in batches for key in batch.get(KEYS, ())]
        mine = {"rank": self._runtime.rank, "losses": [float(loss) for loss in losses], "keys": keys}
        reports = _all_gather(mine, self._runtime)
        if self._runtime.is_main:
            place = self._folder / f"{trouble}-{self._phase}-{step:06d}.json"
            write_atomic(place, json.dumps({"what": what, "step": step, "ranks": reports}, indent=1) + "\n")
        bad = [r for r in reports if not all(math.isfinite(loss) for loss in r["losses"])] or reports
        named = [key for report in bad for key in report["keys"]]
        shown = ", ".join(named[:KEYS_SHOWN]) + (f" and {len(named) - KEYS_SHOWN} more" if named[KEYS_SHOWN:] else "")
        leap = f", where {self._mean:.4g} is usual," if trouble == SPIKE else ""
        return (
            f"{self._phase} step {step}: the {what} is {value}{leap} on rank(s) "
            f"{', '.join(str(r['rank']) for r in bad)} with the samples {shown or '(no keys in the batch)'}"
        )

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {
            "caution": self.caution,
            "mean": self._mean,
            "square": self._square,
            "seen": self._seen,
            "in_a_row": self._in_a_row,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.caution, self._mean, self._square = state["caution"], state["mean"], state["square"]
        self._seen, self._in_a_row = int(state["seen"]), int(state["in_a_row"])


def _all_gather(value: dict[str, Any], runtime: Runtime) -> Sequence[dict[str, Any]]:
    if runtime.group is None:
        return [value]
    gathered: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(gathered, value, group=runtime.group)
    return gathered
