"""What ZeRO leaves of gradients and weights on this rank, by parameter; nothing is gathered."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mmfoundry.pipeline.engine import Engine


def gradient_norms(engine: Engine) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The L2 norm of this rank's slice of each parameter's joint gradient, between the backward pass and the step.

    Args:
        engine: of ZeRO stage 1, 2 or 3; norms are multiplied with its loss scale, as the gradients are.
    """
    optimizer = engine.deepspeed.optimizer
    if engine.offloads_optimizer:
        for parameter in engine.trainable:  # DeepSpeed takes the norms on the way to the host
            norm = optimizer.norm_for_param_grads.get(optimizer.get_param_id(parameter))
            if norm is not None:
                yield parameter, norm
        return
    groups = optimizer.fp16_groups if engine.stage == 3 else optimizer.params_in_partition
    for index, parameters in enumerate(groups):
        slices = (each for each in optimizer.averaged_gradients[index] if not getattr(each, "_zero_padding", False))
        for parameter, gradient in zip(parameters, slices, strict=False):  # behind them there may be more padding
            yield parameter, torch.linalg.vector_norm(gradient, dtype=torch.float32)


def weight_norms(engine: Engine) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The L2 norm of this rank's slice of each trainable parameter; at stages 1 and 2 rank 0 counts the whole one.

    At stage 3, weights that wait on a disk (`offload_param.device: nvme`) are left out.
    """
    for parameter in engine.trainable:
        if engine.stage < 3:
            if engine.rank == 0:
                yield parameter, torch.linalg.vector_norm(parameter.detach(), dtype=torch.float32)
            continue
        mine: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        size: int = parameter.partition_numel()  # type: ignore[attr-defined]
        real = min(max(0, parameter.ds_numel - engine.rank * size), mine.numel())  # type: ignore[attr-defined]
        if real:  # what pads the last rank's slice is no number of the model
            yield parameter, torch.linalg.vector_norm(mine.detach().flatten()[:real], dtype=torch.float32)
