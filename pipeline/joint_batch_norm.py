"""Batch normalisation over the joint batch: ranks share their statistics, so that many give what one process gives.

What torch's SyncBatchNorm does on GPUs (Ioffe and Szegedy 2015, arXiv 1502.03167, over all ranks), on any device and
for timm's subclass as well. The forward pass gathers each rank's count, mean and sum of squared deviations, and merges
them (Chan, Golub and LeVeque 1983); the backward pass sums what the loss asks of mean and variance. The local work
is done by torch's own kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from mmfoundry.pipeline.distributed import all_gather_into
from mmfoundry.pipeline.errors import ConfigError

# Shape suffixes: C = channels, W = ranks

Statistics = tuple[Tensor, Tensor, Tensor]  # mean (C,), biased variance (C,), count ()


def join_batch_norms(model: nn.Module, group: ProcessGroup | None) -> Callable[[], None]:
    """Have a model's batch normalisations, while they train, count the batch of all ranks.

    Frozen ones (torchvision's `FrozenBatchNorm2d`, timm's `FrozenBatchNormAct2d`) count nothing and are left alone, as
    are SyncBatchNorms. Names of parameters and buffers stay. In eval mode nothing changes.

    Args:
        model: every rank calls it alike.
        group: the ranks of the joint batch; None: nothing is to be joined.

    Returns:
        A function that takes it back.

    Raises:
        ConfigError: a kind of batch normalisation that does more than torch's.
    """
    norms = [each for each in model.modules() if isinstance(each, _BatchNorm)]
    found = [each for each in norms if not isinstance(each, nn.SyncBatchNorm)]
    if group is None or not found:
        return lambda: None
    behind = [_behind(each) for each in found]  # refuses before anything is changed
    for module, rest in zip(found, behind, strict=True):
        # Hides the method of the class, as long as it is there.
        module.forward = partial(_forward, module, module.forward, rest, group)  # type: ignore[method-assign]

    def part() -> None:
        for module in found:
            del module.forward

    return part


def _behind(module: _BatchNorm) -> Callable[[Tensor], Tensor] | None:
    """What a subclass does behind the normalisation; None: nothing."""
    if type(module).forward is _BatchNorm.forward:
        return None
    # Imported here: timm takes a second, and is loaded already where it was subclassed.
    from timm.layers.norm_act import BatchNormAct2d

    if type(module) is BatchNormAct2d:
        return lambda normalised: module.act(module.drop(normalised))
    raise ConfigError(
        f"{type(module).__name__}: a batch normalisation whose forward pass is not torch's, so that its statistics "
        "cannot be those of all ranks' samples: train on one process, or freeze it"
    )


def _forward(
    module: _BatchNorm,
    alone: Callable[[Tensor], Tensor],
    behind: Callable[[Tensor], Tensor] | None,
    group: ProcessGroup,
    x: Tensor,
) -> Tensor:
    if not module.training:
        return alone(x)
    module._check_input_dim(x)
    mean_C, variance_C, count = _joint_statistics(x.detach(), group)
    _keep(module, mean_C, variance_C, count)
    normalised: Tensor = _Normalise.apply(x, module.weight, module.bias, mean_C, variance_C, count, module.eps, group)
    return normalised if behind is None else behind(normalised)


@torch.no_grad()
def _joint_statistics(x: Tensor, group: ProcessGroup) -> Statistics:
    """Of each channel, over all ranks, at least fp32; ranks may have unequally many samples."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_C, variance_C = torch.batch_norm_update_stats(wide, None, None, 0.0)  # of var_mean's time a quarter
    count = x.numel() // x.shape[1]
    mine = torch.cat([mean_C, variance_C * count, mean_C.new_tensor([count])])
    gathered = mine.new_empty(dist.get_world_size(group) * len(mine))
    all_gather_into(gathered, mine, group)
    mean_WC, squares_WC, count_W1 = gathered.view(-1, len(mine)).split([len(mean_C), len(mean_C), 1], dim=1)
    total = count_W1.sum()
    joint_C = (mean_WC * count_W1).sum(0) / total
    squares_C = (squares_WC + count_W1 * (mean_WC - joint_C) ** 2).sum(0)
    return joint_C, squares_C / total, total


@torch.no_grad()
def _keep(module: _BatchNorm, mean_C: Tensor, variance_C: Tensor, count: Tensor) -> None:
    """Update the running statistics as torch's do: the variance kept is the unbiased one."""
    if not module.track_running_stats or module.running_mean is None or module.running_var is None:
        return
    momentum: float | Tensor | None = module.momentum
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / module.num_batches_tracked.to(mean_C.dtype)
    moved = 0.0 if momentum is None else momentum
    unbiased_C = variance_C * (count / (count - 1))
    for kept, now in ((module.running_mean, mean_C), (module.running_var, unbiased_C)):
        kept.lerp_(now.to(kept.dtype), torch.as_tensor(moved, dtype=kept.dtype, device=kept.device))


class _Saved(NamedTuple):
    """What the backward pass reads."""

    x: Tensor
    weight: Tensor
    mean: Tensor
    variance: Tensor
    samples: Tensor


class _Normalise(torch.autograd.Function):
    """Normalises by given statistics that are those of all ranks' `x`, and differentiates through them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean_C: Tensor,
        variance_C: Tensor,
        count: Tensor,
        eps: float,
        group: ProcessGroup,
    ) -> Tensor:
        scale = torch.ones_like(mean_C) if weight is None else weight
        ctx.save_for_backward(*_Saved(x, scale, mean_C, variance_C, count))
        ctx.eps, ctx.group = eps, group
        return torch.native_batch_norm(x, scale, bias, mean_C, variance_C, False, 0.0, eps)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = _Saved(*ctx.saved_tensors)
        direct, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, saved.x, saved.weight, saved.mean, saved.variance, None, None, False, ctx.eps, [True, True, True]
        )
        of_x, of_weight, of_bias, *others = ctx.needs_input_grad
        affine = (grad_weight if of_weight else None, grad_bias if of_bias else None, *[None] * len(others))
        if not of_x:
            return None, *affine
        # The gradient through mean and variance, for which every rank's samples count: subtract from the direct one its
        # mean, and its projection on the normalised input.
        asked = torch.stack([grad_bias, grad_weight]).to(saved.mean.dtype)
        dist.all_reduce(asked, group=ctx.group)
        inverse_C = (saved.variance + ctx.eps).rsqrt()
        shared_C = saved.weight * inverse_C / saved.samples
        slope_C = shared_C * asked[1] * inverse_C
        offset_C = shared_C * asked[0] - slope_C * saved.mean
        shape = [1, -1, *[1] * (saved.x.ndim - 2)]
        through = torch.addcmul(offset_C.view(shape), saved.x.to(slope_C.dtype), slope_C.view(shape))
        return (direct - through).to(saved.x.dtype), *affine
