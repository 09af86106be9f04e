"""What every conversion to one of our CLIPs needs: sizes, and the last step."""

from __future__ import annotations

import math

from torch import Tensor

from mmfoundry.models.clip import CLIP, ClipConfig
from mmfoundry.models.io import clip_from_state


def build(config: ClipConfig, weights: dict[str, Tensor], source: str) -> CLIP:
    """Our model with these weights; the limit on the inverse temperature is lifted where they are past it.

    Raises:
        DamagedInput: the weights do not fit the config.
    """
    limit = config.max_logit_scale
    # A hair of slack: OpenAI's checkpoints hold log(100) rounded.
    if limit is not None and "logit_scale" in weights and float(weights["logit_scale"]) > math.log(limit) + 1e-3:
        config = config.model_copy(update={"max_logit_scale": None})
    return clip_from_state(config, weights, source)


def ratio_of(hidden: int, width: int) -> float:
    """`hidden / width`, or the next number above, such that `int(width * ratio)` is `hidden` again."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
