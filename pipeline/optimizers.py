"""Optimizers by name, and which parameters are decayed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import nn

from mmfoundry.pipeline.config import Config
from mmfoundry.pipeline.registry import Registry

ParamGroup = dict[str, Any]
OPTIMIZERS: Registry[Callable[[list[ParamGroup], OptimizerConfig], torch.optim.Optimizer]] = Registry("optimizer")


class OptimizerConfig(Config):
    """How gradients become updates."""

    type: str = Field("adamw", description="name in the registry of optimizers")
    lr: float = Field(1e-3, gt=0, description="peak learning rate; the schedule scales it")
    betas: tuple[float, float] = Field((0.9, 0.98), description="decay of the first and second moment, each in [0, 1)")
    eps: float = Field(1e-6, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled weight decay, times the learning rate; matrices and embeddings only"
    )

    @field_validator("type")
    @classmethod
    def _known(cls, name: str) -> str:
        OPTIMIZERS[name]  # raises UnknownName, which lists the known ones
        return name

    @field_validator("betas")
    @classmethod
    def _decays(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"each must be in [0, 1), not {betas}")
        return betas


@OPTIMIZERS.register("adamw")
def adamw(groups: list[ParamGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101), one fused pass a tensor."""
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def decay_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    no_decay: Collection[str] = (),
    lr_scale: float = 1.0,
) -> list[ParamGroup]:
    """Split trainable parameters into those that are decayed and those that are not.

    Vectors and scalars (norms, biases, temperatures) are never decayed; among the rest, those that the model declares
    (position embeddings, class tokens) are not. Nothing is decided by a part of a name.

    Args:
        parameters: names and parameters, as from `named_parameters()`; frozen ones are left out.
        weight_decay: of the decayed group.
        no_decay: full names among `parameters` that are not decayed although they have two or more dimensions.
        lr_scale: multiplies the learning rate of both groups.
    Returns:
        One or two groups with keys `params`, `weight_decay`, `lr_scale`; concatenate several calls' for `train`.
    Raises:
        ValueError: a name in `no_decay` is not among `parameters`.
    """
    named = dict(parameters)
    unknown = sorted(set(no_decay) - set(named))
    if unknown:
        raise ValueError(f"no_decay names what the model does not have: {', '.join(unknown[:5])}")
    trainable = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    decayed = [p for name, p in trainable.items() if p.ndim >= 2 and name not in no_decay]
    spared = [p for name, p in trainable.items() if p.ndim < 2 or name in no_decay]
    groups = [(decayed, weight_decay), (spared, 0.0)]
    return [{"params": params, "weight_decay": decay, "lr_scale": lr_scale} for params, decay in groups if params]
