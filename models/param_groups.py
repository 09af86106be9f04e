"""Which of a CLIP's parameters learn how fast: a rate a tower, lower ones towards the input."""

from __future__ import annotations

from pydantic import Field

from mmfoundry.models.clip import CLIP
from mmfoundry.models.open_clip_groups import Tower, group_depths
from mmfoundry.models.open_clip_model import OpenClip
from mmfoundry.models.text import TextTower
from mmfoundry.models.vision import VisionTower
from mmfoundry.pipeline.config import Config
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.optimizers import ParamGroup, decay_groups

JOINT = "joint"  # what belongs to no tower: temperature, bias


class TowerRate(Config):
    """How fast one tower and its projection learn."""

    lr_scale: float = Field(1.0, gt=0, description="multiplies optimizer.lr")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="a block's rate over that of the block above it; 1: all blocks learn alike"
    )


class TowerRates(Config):
    """How fast the towers learn, one against the other."""

    image: TowerRate = Field(TowerRate(), description="vision tower and its projection")
    text: TowerRate = Field(TowerRate(), description="text tower and its projection")


def clip_param_groups(
    model: CLIP | OpenClip, weight_decay: float, rates: TowerRates | None = None, hidden_apart: bool = False
) -> list[ParamGroup]:
    """The groups to train a CLIP with; norms, biases, positions, class token, probe, scale do not decay.

    Layer decay counts as BEiT's (Bao et al. 2021, arXiv 2106.08254) and EVA-CLIP's do: the projection, a tower's head
    and its last norm learn at the full rate, the top block at `layer_decay` times it, the embeddings slowest. Of a
    model that open_clip computes, layers are the groups of its `lock`, where the last norm is with the top block.

    Args:
        model: frozen parameters are left out.
        weight_decay: of what is decayed.
        rates: None: everything at the same rate, in one or two groups.
        hidden_apart: whether what is no hidden matrix (embeddings, patches, projections) gets groups of its own, with
            `matrices` False: for optimizers that orthogonalise.
    Returns:
        As `decay_groups`; where rates differ, `part` says whose each group is.

    Raises:
        ConfigError: a layer decay for a tower of open_clip that has no groups of layers.
    """
    rates = rates or TowerRates()
    scale = _rates(model, rates) if isinstance(model, CLIP) else _rates_of_open_clip(model, rates)
    uniform = rates == TowerRates()
    hidden = {id(weight) for block in model.repeated_blocks() for weight in block.parameters()}

    buckets: dict[tuple[str, float, bool], list[str]] = {}
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        part, lr_scale = (JOINT, 1.0) if uniform else scale.get(id(parameter), (JOINT, 1.0))
        buckets.setdefault((part, lr_scale, not hidden_apart or id(parameter) in hidden), []).append(name)
    no_decay = model.no_weight_decay()
    groups = []
    for (part, lr_scale, matrices), names in buckets.items():
        for group in decay_groups(((n, named[n]) for n in names), weight_decay, no_decay & set(names), lr_scale):
            more = {} if uniform else {"part": part}
            groups.append(group | {"matrices": group["matrices"] and matrices} | more)
    return groups


def _rates(model: CLIP, rates: TowerRates) -> dict[int, tuple[str, float]]:
    """The tower and the rate of each parameter that belongs to one, by id."""
    scale: dict[int, tuple[str, float]] = {}
    scale |= _tower(model.vision_model, "image", rates.image)
    scale |= _tower(model.text_model, "text", rates.text)
    if model.visual_projection is not None:
        scale |= {id(model.visual_projection.weight): ("image", rates.image.lr_scale)}
    if model.text_projection is not None:
        scale |= {id(model.text_projection.weight): ("text", rates.text.lr_scale)}
    return scale


def _rates_of_open_clip(model: OpenClip, rates: TowerRates) -> dict[int, tuple[str, float]]:
    image = {id(weight) for weight in model.open_clip.visual.parameters()}
    joint = {id(model.logit_scale), id(model.logit_bias)}
    towers = {"image": (rates.image, _depths(model, "image", rates.image))}
    towers |= {"text": (rates.text, _depths(model, "text", rates.text))}
    scale: dict[int, tuple[str, float]] = {}
    for key in (id(weight) for weight in model.parameters()):
        if key not in joint:
            part = "image" if key in image else "text"
            rate, depths = towers[part]
            scale[key] = (part, rate.lr_scale * rate.layer_decay ** depths.get(key, 0))
    return scale


def _depths(model: OpenClip, tower: Tower, rate: TowerRate) -> dict[int, int]:
    """Depths of a tower's parameters by id, where layers learn unlike."""
    if rate.layer_decay == 1:
        return {}
    try:
        return group_depths(model, tower)
    except ConfigError as error:
        raise ConfigError(f"towers.{tower}.layer_decay: {error}") from error


def _tower(tower: VisionTower | TextTower, part: str, rate: TowerRate) -> dict[int, tuple[str, float]]:
    """The rate of each of a tower's parameters, by id."""
    top = len(tower.encoder.layers)
    scale = {id(parameter): rate.lr_scale for parameter in tower.parameters()}
    for depth, block in enumerate(tower.encoder.blocks()):
        scale |= {id(parameter): rate.lr_scale * rate.layer_decay ** (top - depth) for parameter in block.parameters()}
    below = [tower.embeddings, *([tower.pre_layrnorm] if isinstance(tower, VisionTower) else [])]
    for module in below:
        scale |= {id(parameter): rate.lr_scale * rate.layer_decay ** (top + 1) for parameter in module.parameters()}
    return {key: (part, value) for key, value in scale.items()}
