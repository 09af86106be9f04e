"""Optimizers by name, and which parameters are decayed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from mmfoundry.pipeline.config import Config
from mmfoundry.pipeline.registry import Registry
from mmfoundry.pipeline.sliced_muon import SlicedMuon
from mmfoundry.pipeline.sliced_optimizers import SlicedLamb, SlicedOptimizer, SlicedSgdSai
from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

ParamGroup = dict[str, Any]
OPTIMIZERS: Registry[Callable[[list[ParamGroup], OptimizerConfig], torch.optim.Optimizer]] = Registry("optimizer")

# What an optimizer's authors advise where it differs from the fields' own defaults.
ADVISED: Mapping[str, Mapping[str, Any]] = {
    "lion": {"betas": (0.9, 0.99)},
    "adan": {"betas": (0.98, 0.92, 0.99), "eps": 1e-8},
    "muon": {"momentum": 0.95},
    "sgd_sai": {"momentum": 0.9, "eps": 1e-8},
}


class OptimizerConfig(Config):
    """How gradients become updates."""

    type: str = Field("adamw", description="name in the registry of optimizers")
    lr: float = Field(1e-3, gt=0, description="peak learning rate; the schedule scales it")
    betas: tuple[float, ...] = Field(
        (0.9, 0.98), description="decay of the moments, each in [0, 1): first and second; adan: also of differences"
    )
    momentum: float | None = Field(None, ge=0, lt=1, description="of muon (0.95) and sgd_sai (0.9); others have betas")
    eps: float = Field(1e-6, gt=0, description="added to what is divided by")
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled weight decay, times the learning rate; matrices and embeddings only"
    )

    @model_validator(mode="before")
    @classmethod
    def _advised(cls, tree: Any) -> Any:
        if isinstance(tree, Mapping) and isinstance(tree.get("type"), str):
            given = {key: value for key, value in tree.items() if value is not None}
            return {**ADVISED.get(tree["type"], {}), **given}
        return tree

    @field_validator("type")
    @classmethod
    def _known(cls, name: str) -> str:
        OPTIMIZERS[name]  # raises UnknownName, which lists the known ones
        return name

    @field_validator("betas")
    @classmethod
    def _decays(cls, betas: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"each must be in [0, 1), not {betas}")
        return betas

    @model_validator(mode="after")
    def _fits_the_type(self) -> OptimizerConfig:
        wanted = len(ADVISED.get(self.type, {}).get("betas", (0.9, 0.98)))
        if len(self.betas) != wanted:
            raise ValueError(f"{self.type} has {wanted} betas, not {len(self.betas)}")
        if self.momentum is not None and self.type in ("adamw", "lamb", "lion", "adan"):
            raise ValueError(f"{self.type} has no momentum of this name: set betas")
        return self


def build_optimizer(groups: list[ParamGroup], config: OptimizerConfig, zero_stage: int = 0) -> torch.optim.Optimizer:
    """The optimizer of a config.

    Args:
        groups: from `decay_groups`.
        config: which, and its numbers.
        zero_stage: how the engine cuts up what the optimizer is given. From 1 on, one that looks at whole tensors is
            a `SlicedOptimizer`, which wants to be told what lies where.
    """
    optimizer = OPTIMIZERS[config.type](groups, config)
    sliced = _sliced(config.type) if zero_stage else None
    return optimizer if sliced is None else sliced(optimizer)


def looks_at_whole_tensors(name: str) -> bool:
    """Whether the update of one number depends on others of its tensor."""
    return _sliced(name) is not None


def _sliced(name: str) -> type[SlicedOptimizer] | None:
    return {"muon": SlicedMuon, "lamb": SlicedLamb, "sgd_sai": SlicedSgdSai}.get(name)


@OPTIMIZERS.register("adamw")
def adamw(groups: list[ParamGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101), one fused pass a tensor."""
    betas: Any = config.betas
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


@OPTIMIZERS.register("lion")
def lion(groups: list[ParamGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Sign of a moving average (Chen et al. 2023, arXiv 2302.06675); wants a third to a tenth of AdamW's rate."""
    return _timm().Lion(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


@OPTIMIZERS.register("adan")
def adan(groups: list[ParamGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam with Nesterov momentum from differences of gradients (Xie et al. 2022, arXiv 2208.06677)."""
    optimizer = _timm().Adan(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    return _count_a_state(optimizer, int)


@OPTIMIZERS.register("lamb")
def lamb(groups: list[ParamGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam with a rate a tensor, by the ratio of norms (You et al. 2019, arXiv 1904.00962), for large batches."""
    optimizer = _timm().Lamb(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        max_grad_norm=None,  # the engine clips
    )
    return _count_a_state(optimizer, lambda count: torch.tensor(count))


@OPTIMIZERS.register("muon")
def muon(groups: list[ParamGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Orthogonalised momentum for hidden matrices (Jordan et al. 2024), AdamW with Nesterov momentum for the rest.

    Updates of matrices have the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so one rate does for both.
    """
    # Groups that do not say are left to timm, which judges by shape.
    routed = [group | ({"use_muon": group["matrices"]} if "matrices" in group else {}) for group in groups]
    return _timm().Muon(
        routed,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=True,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )


@OPTIMIZERS.register("sgd_sai")
def sgd_sai(groups: list[ParamGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
    """SGD with momentum, rates scaled at the first step (Xu et al. 2024, arXiv 2412.11768): half of AdamW's memory."""
    from mmfoundry.pipeline.sgd_sai import SgdSai

    momentum = 0.9 if config.momentum is None else config.momentum
    return SgdSai(groups, lr=config.lr, momentum=momentum, weight_decay=config.weight_decay, eps=config.eps)


def _timm() -> Any:
    declare_missing_ops()  # timm imports torchvision
    import timm.optim

    return timm.optim


def _count_a_state(optimizer: torch.optim.Optimizer, as_count: Callable[[float], Any]) -> torch.optim.Optimizer:
    """Have updates counted with a tensor's other states, as torch does, and not with its group, as timm does.

    Checkpoints find the count there, and at ZeRO stage 3 a group's tensors are updated one after the other.
    """

    def before(optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        for group in optimizer.param_groups:
            states = [optimizer.state.get(p, {}) for p in group["params"]]
            count = max((float(state.get("step", 0)) for state in states), default=0.0)
            group.pop("step", None)
            if count:
                group["step"] = as_count(count)

    def after(optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if optimizer.state.get(p):
                    optimizer.state[p]["step"] = torch.tensor(float(group["step"]))

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


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
        One or two groups with keys `params`, `weight_decay`, `lr_scale` and `matrices` (whether an optimizer may treat
        them as such); concatenate several calls' for `train`.
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
    groups = [(decayed, weight_decay, True), (spared, 0.0, False)]
    return [
        {"params": params, "weight_decay": decay, "lr_scale": lr_scale, "matrices": matrices}
        for params, decay, matrices in groups
        if params
    ]
