"""One model under the DeepSpeed engine: the same calls for one process or many, on CPU or GPU, at every ZeRO stage."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mmfoundry.pipeline import grad_cache
from mmfoundry.pipeline.blocks import wrap_blocks
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.engine_config import EngineConfig, deepspeed_config, zero_stage
from mmfoundry.pipeline.grad_cache import Batch
from mmfoundry.pipeline.joint_batch_norm import join_batch_norms
from mmfoundry.pipeline.optimizers import ParamGroup
from mmfoundry.pipeline.sliced_optimizers import SlicedOptimizer
from mmfoundry.pipeline.slices import partitions_of

Objective = Callable[[Any, Batch, ProcessGroup | None], dict[str, Tensor]]

# Loss scaling for fp16 (Micikevicius et al. 2018, arXiv 1710.03740), with torch.amp's constants.
FIRST_LOSS_SCALE = 2.0**16
LOSS_SCALE_DOUBLES_AFTER = 2000


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The arithmetic of a forward pass in a trainer's `precision`."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


class _ModelWithLoss(nn.Module):
    """What DeepSpeed drives: it finds where to hook only in plain tensors and dicts, such as an objective returns."""

    def __init__(self, model: nn.Module, objective: Objective, runtime: Runtime, precision: str) -> None:
        super().__init__()
        self.model = model
        self._objective = objective
        self._group = runtime.group
        self._device, self._precision = runtime.device, precision

    def forward(self, batch: Batch, grads: Sequence[Tensor | None] | None = None, output_only: bool = False) -> Any:
        """The objective's values; or, of the two passes of a gradient cache, the model's output or its product."""
        with autocast(self._precision, self._device):
            output = self.model(batch)
            if output_only:
                return output
            if grads is not None:
                return {"loss": grad_cache.inner_product(output, grads)}
            return self.values(output, batch)

    def values(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """What the objective says of a model's output."""
        with autocast(self._precision, self._device):
            return dict(self._objective(output, batch, self._group))


class Engine:
    """Forward, backward and step of one training phase.

    Attributes:
        model: the model as the stage passed it.
        deepspeed: the engine underneath.
        base_optimizer: the torch optimizer that DeepSpeed drives.
        trainable: the parameters that it updates.
        stage: the ZeRO stage that is run.
        device: where this rank's tensors live.
        offloads_optimizer: whether the optimizer's states, and so the gradients, are kept off the device.
        loss_scale: what the loss is multiplied with before the backward pass; 1 except in fp16.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: nn.Module,
        objective: Objective,
        optimizer: Callable[[list[ParamGroup]], torch.optim.Optimizer],
        groups: list[ParamGroup],
        runtime: Runtime,
    ) -> None:
        self.model = model
        self.stage = zero_stage(config, runtime.world_size)
        self.offloads_optimizer = self.stage > 0 and config.zero_optimization.offload_optimizer.device != "none"
        self.rank, self.world_size = runtime.rank, runtime.world_size
        self._config = config
        self.trainable = [p for group in groups for p in group["params"]]
        self.loss_scale = FIRST_LOSS_SCALE if config.precision == "fp16" else 1.0
        self.good_steps = 0  # since the loss scale last changed
        on_gpu = runtime.device.type == "cuda"
        numel = sum(p.numel() for p in self.trainable)
        settings = deepspeed_config(config, runtime.world_size, numel, on_gpu)
        self.device = runtime.device
        self._valid: Tensor | None = None
        self._rows = config.micro_batches(runtime.world_size)[0]
        self._chunks = config.chunks(runtime.world_size)
        module = self._module = _ModelWithLoss(model, objective, runtime, config.precision)
        self._parameters_before = {parameter: set(vars(parameter)) for parameter in model.parameters()}
        self.base_optimizer = optimizer(groups)
        with contextlib.ExitStack() as environment:
            environment.callback(wrap_blocks(config, model))
            environment.callback(join_batch_norms(model, runtime.group))
            environment.enter_context(_local_rank(runtime.local_rank))
            self.deepspeed = _initialize(module, self.base_optimizer, settings, runtime)
            self._environment = environment.pop_all()
        if isinstance(self.base_optimizer, SlicedOptimizer):
            self.base_optimizer.bind(partitions_of(self.deepspeed.optimizer, self.stage), self.device)
        for group in self.deepspeed.optimizer.param_groups:
            group["peak_lr"] = group["lr"] * group.get("lr_scale", 1.0)
        if runtime.world_size == 1 and self.stage == 0:
            # With one process there is nothing to reduce; DeepSpeed would still copy every gradient twice.
            self.deepspeed.enable_backward_allreduce = False
        if self.stage:
            self._refuse_what_is_not_valid()
        self._apply_loss_scale()

    def accumulate(self, batch: Batch, weight: Tensor | None = None) -> dict[str, Tensor]:
        """Add one micro-batch's gradient, through the gradient cache where there is one.

        Args:
            batch: on the device.
            weight: what its loss is multiplied with; None stands for 1.

        Returns:
            The objective's values, without gradients; `loss` is not multiplied with the weight.
        """
        if self._chunks == 1:
            values = self.forward(batch)
            self.backward(values["loss"] if weight is None else values["loss"] * weight)
        else:
            values = self._accumulate_cached(batch, weight)
        return {name: value.detach() for name, value in values.items()}

    def _accumulate_cached(self, batch: Batch, weight: Tensor | None) -> dict[str, Tensor]:
        chunks = grad_cache.split_rows(batch, self._rows, self._rows // self._chunks)
        # DeepSpeed takes a mean over all passes of a step; chunks are to be summed. The loss scale comes first and
        # not last, because outputs may be 16-bit, and so are their gradients then.
        share = len(chunks) / self.loss_scale
        return grad_cache.accumulate(
            chunks,
            forward=lambda chunk: self.deepspeed(chunk, output_only=True),
            values=lambda output: self._module.values(output, batch),
            backward=lambda chunk, grads: self.backward(self.deepspeed(chunk, grads=grads)["loss"] * share),
            factor=self.loss_scale if weight is None else weight * self.loss_scale,
            buffers=self.model.buffers(),
            device=self.device,
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Run model and objective on one micro-batch; `loss` in the result is not scaled yet."""
        return self.deepspeed(batch)

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradient; at the last of a step, gradients are averaged over ranks."""
        self.deepspeed.backward(loss * self.loss_scale if self.stage == 0 else loss)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # counts the micro-batch; updates nothing

    def discard(self) -> None:
        """End the step without an update, and forget the gradients."""
        if self.stage == 0:
            self.deepspeed.zero_grad()
            self.deepspeed.micro_steps += 1
            return
        self._valid = torch.zeros((), dtype=torch.bool, device=self.device)
        self.deepspeed.step()
        if self.deepspeed.was_step_applied():
            raise RuntimeError("this release of DeepSpeed updates weights although the gradient norm is infinite")

    def _refuse_what_is_not_valid(self) -> None:
        """DeepSpeed leaves out a step whose gradient norm is infinite: so is that of a step that is not valid."""
        optimizer = self.deepspeed.optimizer
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        norms = getattr(optimizer, name)

        def checked(*args: Any, **kwargs: Any) -> Any:
            found = norms(*args, **kwargs)
            return [self._or_infinite(found[0]), *found[1:]] if self.stage == 3 else self._or_infinite(found)

        setattr(optimizer, name, checked)

    def _or_infinite(self, norm: Tensor) -> Tensor:
        if self._valid is None:
            return norm
        # Where the norm is on the host, DeepSpeed has waited for the device already.
        valid = self._valid.to(norm.device) if self.offloads_optimizer else self._valid
        return torch.where(valid, norm, torch.full_like(norm, math.inf))

    def step(self, lr_factor: float, valid: Tensor | None = None) -> Tensor:
        """Clip, update, and forget the gradients; a gradient that is not finite updates nothing.

        Args:
            lr_factor: multiplies the peak learning rates, from the schedule.
            valid: () bool, on the device, alike on all ranks: where it is false, nothing is updated. Then the host
                does not wait for the device either, at stage 0 with a fused optimizer; at the other stages DeepSpeed
                waits for the norm. None: it is true, and the host waits.

        Returns:
            () the L2 norm of the joint gradient before clipping; where nothing was updated because of it, inf or nan.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        self._valid = valid
        norm = self._step_unpartitioned() if self.stage == 0 else self._step_partitioned()
        if self._config.precision == "fp16":
            self._adapt_loss_scale(math.isfinite(norm))
        return norm

    @property
    def lr(self) -> float:
        """The highest learning rate of the last step."""
        return max(group["lr"] for group in self.deepspeed.optimizer.param_groups)

    def _step_unpartitioned(self) -> Tensor:
        grads = []
        for parameter in self.trainable:
            if parameter.grad is None:  # as DeepSpeed does when it reduces: a parameter no loss reached still decays
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
        norm = torch.nn.utils.get_total_norm(grads) / self.loss_scale
        applied = norm.isfinite() if self._valid is None else norm.isfinite() & self._valid
        # What torch's fused optimizers do for its GradScaler: they read on the device whether to update.
        if self._valid is not None and getattr(self.base_optimizer, "_step_supports_amp_scaling", False):
            self.base_optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]
        elif not applied:
            self.discard()
            return norm
        limit = self._config.gradient_clipping
        # In fp64, as the host would reckon; a product with 1 changes nothing.
        shrink = (limit / (norm.double() + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm).double()
        factor = (shrink / self.loss_scale).float()
        if (limit or self.loss_scale != 1.0) and not is_one_on_the_host(factor):
            torch._foreach_mul_(grads, factor)
        self.deepspeed.step()
        return norm

    def _step_partitioned(self) -> Tensor:
        self.deepspeed.step()
        if not self.deepspeed.was_step_applied():
            return torch.full((), math.inf, device=self.device)
        return torch.as_tensor(self.deepspeed.get_global_grad_norm())

    def _adapt_loss_scale(self, finite: bool) -> None:
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.loss_scale = max(self.loss_scale / 2, 1.0)
        elif self.good_steps >= LOSS_SCALE_DOUBLES_AFTER:
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0
        self._apply_loss_scale()

    def restore_loss_scale(self, loss_scale: float, good_steps: int) -> None:
        """Go on with the loss scale of a checkpoint."""
        self.loss_scale, self.good_steps = loss_scale, good_steps
        self._apply_loss_scale()

    def _apply_loss_scale(self) -> None:
        if self.stage > 0 and self._config.precision == "fp16":
            self.deepspeed.optimizer.override_loss_scale(self.loss_scale)

    def close(self) -> None:
        """Let go of the model: whole again on every rank, with DeepSpeed's hooks and buffers gone."""
        if self.stage == 3:
            parameters = list(self.model.parameters())
            parameters[0].all_gather(parameters)  # type: ignore[attr-defined]
        self.deepspeed.destroy()
        self.deepspeed.module_forward_pre_hook.remove()
        self.deepspeed.module_forward_post_hook.remove()
        for parameter, names in self._parameters_before.items():
            whole = parameter.detach().clone() if self.stage else parameter.detach()  # else it keeps the flat buffer
            parameter.grad = None
            for name in vars(parameter).keys() - names:  # a later engine would take them for its own
                delattr(parameter, name)
            parameter.data = whole
        self._environment.close()

    def abandon(self) -> None:
        """After an error: let go without asking the other ranks for anything; the model is left as it is."""
        self._environment.close()


def is_one_on_the_host(factor: Tensor) -> bool:
    """Whether a () factor is 1, known without waiting for a device: on a CPU, which it spares a pass over memory."""
    return factor.device.type == "cpu" and float(factor) == 1.0


def _initialize(
    module: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any], runtime: Runtime
) -> Any:
    import deepspeed
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every optimizer that is not its own
    try:
        with _equal_already(module, runtime.group):
            engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=dict(settings))
    finally:
        logger.setLevel(level)
    return engine


@contextlib.contextmanager
def _local_rank(local_rank: int) -> Iterator[None]:
    """Set the variable that DeepSpeed reads, while it does: later, accelerate would take it for a launcher's."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(local_rank)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]


@contextlib.contextmanager
def _equal_already(module: nn.Module, group: ProcessGroup | None) -> Iterator[None]:
    """Give all ranks rank 0's weights ourselves: DeepSpeed sends them as bytes, and fails on 0-d parameters."""
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.zero.partition_parameters import Init

    if group is not None:
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            dist.broadcast(tensor.data, 0, group=group)

    def partition(init: Any, parameter: nn.Parameter) -> None:
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]

    replaced = (DeepSpeedEngine._broadcast_model, Init._zero_init_param)
    DeepSpeedEngine._broadcast_model, Init._zero_init_param = lambda engine: None, partition
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model, Init._zero_init_param = replaced
