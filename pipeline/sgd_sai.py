"""SGD with momentum whose learning rates are scaled once, tensor by tensor, from the first gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class SgdSai(torch.optim.Optimizer):
    """SGD-SaI (Xu et al. 2024, arXiv 2412.11768): half of AdamW's states.

    Each tensor's rate is multiplied with the signal-to-noise ratio of its first gradient, its L2 norm over the standard
    deviation of its elements; of vectors and scalars, with the norm alone. Weight decay is decoupled.

    Args:
        params: parameters or groups of them, whole tensors.
        lr: learning rate before the scaling.
        momentum: share of the moving average that a step keeps.
        weight_decay: times the learning rate.
        eps: added to the standard deviation.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 1e-2,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                    state["ratio"] = signal_to_noise(p.grad, group["eps"])
                average = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(average * (group["lr"] * state["ratio"]))
        return loss


def signal_to_noise(grad: Tensor, eps: float) -> Tensor:
    """L2 norm over standard deviation, (); the norm alone where there are no two rows to compare."""
    norm = torch.linalg.vector_norm(grad)
    if grad.ndim < 2 or grad.shape[0] == 1:
        return norm
    deviation = grad.std()
    return torch.where(deviation > 0, norm / (deviation + eps), norm)
