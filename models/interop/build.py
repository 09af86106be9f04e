"""What every conversion to and from one of our CLIPs needs: sizes, weights as they act, and the last step."""

from __future__ import annotations

import math
from collections.abc import Mapping

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


def acting_state(model: CLIP) -> dict[str, Tensor]:
    """Our weights by name, sharing memory with the model's; the inverse temperature as it acts: held at its limit."""
    state = {name: value.detach() for name, value in model.state_dict().items()}
    state["logit_scale"] = model.scale().detach().log().to(state["logit_scale"].dtype)
    return state


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model of transformers, copied; positions that older versions saved as buffers are left out."""
    return {name: value.detach().clone() for name, value in state.items() if not name.endswith(".position_ids")}


def ratio_of(hidden: int, width: int) -> float:
    """`hidden / width`, or the next number above, such that `int(width * ratio)` is `hidden` again."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
