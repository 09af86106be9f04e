"""Groups of layers in the towers that open_clip computes, as its own `lock` counts them: what learns, and how fast.

A group is whatever `lock` frees together, so nothing here knows how a tower is built or what its parts are called.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import nn

from mmfoundry.models.open_clip_model import OpenClip
from mmfoundry.pipeline.errors import ConfigError

Tower = Literal["image", "text"]
_KEYS = {"image": "lock_image_unlocked_groups", "text": "lock_text_unlocked_layers"}
# What `lock` raises of a tower that it cannot lock in part, of timm's also where its layers have no groups.
_REFUSALS = (AssertionError, AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError)
_PLAIN_TEXT = ("token_embedding.", "transformer.", "positional_embedding", "ln_final.", "text_projection")
_PLAIN_BATCH_NORM = (nn.BatchNorm2d, nn.SyncBatchNorm)


def lock_open_clip_tower(model: OpenClip, tower: Tower, unlocked: int = 0, freeze_bn_stats: bool = False) -> None:
    """Freeze a tower as open_clip's `lock_image_tower` and `lock_text_tower` do, but for its last groups.

    Of a timm tower the trunk is locked; the projection that open_clip puts behind it goes on learning. Of a CoCa, which
    has no such methods, the towers' own `lock` is called, and the decoder goes on learning.

    Args:
        model: changed in place; the other tower, scale and bias stay as they are.
        tower: which one.
        unlocked: how many of the last groups go on learning, as open_clip counts them.
        freeze_bn_stats: whether batch normalisations of the image tower keep their statistics, and their scale and
            shift with them; else they go on counting batches while their scale and shift are locked.

    Raises:
        ConfigError: the tower cannot be locked so, or nothing of it would be locked; the key is named.
    """
    if freeze_bn_stats:
        _check_batch_norms(model.open_clip.visual)
    weights = list(_tower(model, tower).parameters())
    try:
        _lock(model, tower, unlocked, freeze_bn_stats)
    except _REFUSALS as error:
        raise ConfigError(f"{_KEYS[tower]}: {_said(error, _tower(model, tower))}") from error
    if all(weight.requires_grad for weight in weights):
        raise ConfigError(f"{_KEYS[tower]} is {unlocked}: this tower has fewer groups, so nothing of it is locked")


def take_open_clip_towers(trained: OpenClip, fresh: OpenClip, which: Literal["both", "image", "text"]) -> OpenClip:
    """One tower of a trained model with its projection, the rest (scale, bias, a decoder) the fresh model's; or all.

    Args:
        trained: gives the tower.
        fresh: of the same weights' names and shapes; changed in place and returned.
        which: the tower that is taken; `both`: everything.
    """
    state = trained.open_clip.state_dict()
    if which == "both":
        fresh.open_clip.load_state_dict(state)
        return fresh
    # A plain CLIP holds the parts of its text tower itself.
    text = ("text.",) if hasattr(trained.open_clip, "text") else _PLAIN_TEXT
    prefixes = ("visual.",) if which == "image" else text
    taken = {name: value for name, value in state.items() if name.startswith(prefixes)}
    fresh.open_clip.load_state_dict(taken, strict=False)
    return fresh


def group_depths(model: OpenClip, tower: Tower) -> dict[int, int]:
    """How many groups lie behind each of a tower's parameters, by id: 0 in the last group.

    What no lock reaches (the projection behind a timm trunk) has depth 0.

    Args:
        model: what learns in it is left as it was.
        tower: which one.

    Raises:
        ConfigError: the tower cannot be locked in part, or open_clip's groups leave parameters out.
    """
    weights = list(_tower(model, tower).parameters())
    flags = [weight.requires_grad for weight in model.parameters()]
    depths = {id(weight): 0 for weight in weights}
    try:
        pending = _locked(model, tower, 0, weights)
        behind = 0
        while pending:
            behind += 1
            still = _locked(model, tower, behind, pending)
            if len(still) == len(pending):
                kind = type(_tower(model, tower)).__name__
                raise ConfigError(f"open_clip's groups leave {len(pending)} parameters of its {kind} out")
            depths |= {id(weight): behind for weight in still}
            pending = still
    except _REFUSALS as error:
        raise ConfigError(_said(error, _tower(model, tower))) from error
    finally:
        for weight, flag in zip(model.parameters(), flags, strict=True):
            weight.requires_grad_(flag)
    return depths


def _locked(model: OpenClip, tower: Tower, unlocked: int, among: list[nn.Parameter]) -> list[nn.Parameter]:
    for weight in model.parameters():  # timm's towers are locked without being unlocked first
        weight.requires_grad_(True)
    _lock(model, tower, unlocked, False)
    return [weight for weight in among if not weight.requires_grad]


def _lock(model: OpenClip, tower: Tower, unlocked: int, freeze_bn_stats: bool) -> None:
    lock: Any = getattr(model.open_clip, f"lock_{tower}_tower", None) or _tower(model, tower).lock
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # open_clip 3.3.0 imports from a place that timm has left
        if tower == "image":
            lock(unlocked_groups=unlocked, freeze_bn_stats=freeze_bn_stats)
        else:
            lock(unlocked_layers=unlocked)


def _said(error: Exception, tower: nn.Module) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"open_clip cannot lock its {type(tower).__name__} in groups: {reason}"


def _tower(model: OpenClip, tower: Tower) -> nn.Module:
    """The module that has a tower's parameters; the whole model for the text tower of open_clip's plain CLIP."""
    module = model.open_clip
    found: nn.Module = module.visual if tower == "image" else getattr(module, "text", module)
    return found


def _check_batch_norms(visual: nn.Module) -> None:
    kinds = {type(each) for each in visual.modules() if isinstance(each, _PLAIN_BATCH_NORM)}
    if not kinds:
        raise ConfigError("lock_image_freeze_bn_stats: this model's image tower has no batch normalisation")
    for kind in sorted(kinds - {*_PLAIN_BATCH_NORM}, key=lambda each: each.__name__):
        raise ConfigError(
            f"lock_image_freeze_bn_stats: open_clip would replace {kind.__name__} by a plain frozen batch "
            "normalisation and lose what else it does (its activation)"
        )


def unfrozen_counts(module: nn.Module) -> dict[str, torch.Tensor]:
    """What batch normalisations have and frozen ones lack, by name: so that a state loads into a module of either."""
    from torchvision.ops.misc import FrozenBatchNorm2d

    frozen = (name for name, each in module.named_modules() if isinstance(each, FrozenBatchNorm2d))
    return {f"{name}.num_batches_tracked": torch.zeros((), dtype=torch.int64) for name in frozen}
