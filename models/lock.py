"""Locked towers: what is trained already stays, in whole or but for its last groups (LiT, Zhai et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from mmfoundry.models.clip import CLIP
from mmfoundry.pipeline.errors import ConfigError

Group = Sequence[nn.Module | nn.Parameter]


def lock_image_tower(model: CLIP, unlocked_groups: int = 0) -> None:
    """Freeze the vision tower and its projection (LiT, arXiv 2111.07991), but for the last groups.

    Groups, as open_clip counts them, from the end: the projection (SigLIP's towers: the head); the last block with the
    norm behind it; each earlier block; the embeddings with the norm behind them.

    Args:
        model: changed in place; the text tower, scale and bias stay as they are.
        unlocked_groups: how many of the last groups go on learning.

    Raises:
        ConfigError: there are fewer groups.
    """
    tower = model.vision_model
    first: Group = [tower.embeddings, tower.pre_layrnorm]
    last = model.visual_projection or tower.head
    groups = _groups(first, list(tower.encoder.layers), tower.post_layernorm, last)
    _lock(groups, unlocked_groups, "lock_image_unlocked_groups")


def lock_text_tower(model: CLIP, unlocked_layers: int = 0) -> None:
    """Freeze the text tower and its projection, but for the last groups, counted as for the vision tower.

    Args:
        model: changed in place; the vision tower, scale and bias stay as they are.
        unlocked_layers: how many of the last groups go on learning; open_clip's name for them.

    Raises:
        ConfigError: there are fewer groups.
    """
    tower = model.text_model
    last = model.text_projection or tower.head
    groups = _groups([tower.embeddings], list(tower.encoder.layers), tower.final_layer_norm, last)
    _lock(groups, unlocked_layers, "lock_text_unlocked_layers")


def take_towers(trained: CLIP, fresh: CLIP, which: Literal["image", "text"]) -> CLIP:
    """A tower of a trained model and the other of a fresh one; scale and bias are the fresh model's.

    Args:
        trained: gives the tower `which` and its projection.
        fresh: of the same config; changed in place and returned.
        which: the tower that is taken.
    """
    tower, projection = {
        "image": ("vision_model", "visual_projection"),
        "text": ("text_model", "text_projection"),
    }[which]
    for name in (tower, projection):
        if getattr(trained, name) is not None:
            fresh.get_submodule(name).load_state_dict(trained.get_submodule(name).state_dict())
    return fresh


def _groups(first: Group, blocks: list[nn.Module], norm: nn.Module, projection: nn.Module | None) -> list[Group]:
    middle: list[Group] = [[block] for block in blocks[:-1]]
    return [first, *middle, [*blocks[-1:], norm], *([] if projection is None else [[projection]])]


def _lock(groups: list[Group], unlocked: int, key: str) -> None:
    if unlocked > len(groups):
        raise ConfigError(f"{key} is {unlocked}, but this tower has {len(groups)} groups")
    for position, group in enumerate(groups):
        for each in group:
            each.requires_grad_(position >= len(groups) - unlocked)
