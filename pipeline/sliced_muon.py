"""Muon over the partitions that ZeRO 1 to 3 leave of the weights: each matrix is orthogonalised by one rank.

DeepSpeed has a Muon of its own, with other updates: another iteration, other sizes, and gradients clipped by a norm
taken after it. This one makes those of stage 0. What it costs beside AdamW's step: the matrices that lie on several
ranks (at stages 1 and 2 one or so a rank and group, at stage 3 all) travel to the rank that orthogonalises them and
back, in bf16, as which the iteration reads and gives them: four bytes a weight, shared out among the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfoundry.pipeline.sliced_optimizers import SlicedOptimizer, count_update, kept
from mmfoundry.pipeline.slices import Cut, Partition, Shares
from mmfoundry.pipeline.torchvision_ops import declare_missing_ops


class SlicedMuon(SlicedOptimizer):
    """timm's Muon (momentum and Nesterov's update by slices, Newton-Schulz on whole matrices), and its AdamW."""

    def bind(self, partitions: Iterable[Partition], device: torch.device) -> None:
        """As `SlicedOptimizer.bind`; shares out the matrices."""
        super().bind(partitions, device)
        self._shares = {
            flat: Shares(partition, _iteration_cost)
            for flat, partition in self.partitions.items()
            if self.param_groups[partition.param_group]["use_muon"]
        }

    def _update(
        self, group: dict[str, Any], partition: Partition, flat: Tensor, grad: Tensor, state: dict[str, Any]
    ) -> None:
        if not group["use_muon"]:
            _update_as_adamw(group, flat, grad, state)
            return
        lr, keeps = group["lr"], group["momentum"]
        flat.mul_(1 - lr * group["weight_decay"])
        momentum = kept(state, "momentum_buffer", flat).lerp_(grad, 1 - keeps)

        def nesterov(cut: Cut) -> Tensor:
            update = partition.mine(cut, grad).lerp(partition.mine(cut, momentum), keeps)
            return update.to(torch.bfloat16).to(self.device)

        def apply(cut: Cut, update: Tensor) -> None:
            scale = _muon().get_lr_scale(_as_matrix(cut.shape), group["adjust_lr_fn"])
            partition.mine(cut, flat).add_(update.to(flat.device), alpha=-lr * scale)

        self._shares[partition.flat].on_whole(nesterov, partial(_orthogonalised, group), apply)


def _orthogonalised(group: dict[str, Any], update: Tensor) -> Tensor:
    muon = _muon()
    coefficients = muon.resolve_ns_coefficients(group["ns_coefficients"], muon._COEFFICIENTS)
    matrix = update.view(_as_matrix(tuple(update.shape)))
    found: Tensor = muon.zeropower_via_newtonschulz(
        matrix, group["ns_steps"], coefficients, eps=group["eps"], safety_factor=group["safety_factor"]
    )
    return found.reshape(update.shape)


def _update_as_adamw(group: dict[str, Any], flat: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
    from timm.optim.nadamw import nadamw

    beta1, beta2 = group["betas"]
    nadamw(
        [flat],
        [grad],
        [kept(state, "exp_avg", flat)],
        [kept(state, "exp_avg_sq", flat)],
        [count_update(state) - 1],  # it counts by itself
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"] * group["fallback_lr_scale"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        caution=False,
        maximize=False,
        max_lr=None,
    )


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor of two or more dimensions, those of a convolution's kernel among the columns."""
    return shape[0], int(torch.Size(shape[1:]).numel())


def _iteration_cost(shape: tuple[int, ...]) -> float:
    rows, columns = _as_matrix(shape)
    return rows * columns * min(rows, columns)


def _muon() -> Any:
    declare_missing_ops()  # timm imports torchvision
    from timm.optim import muon

    return muon
