"""One model under the DeepSpeed engine: the same calls for one process or many, on CPU or GPU, at every ZeRO stage."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mmfoundry.pipeline.config import Config, Neutral
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.optimizers import ParamGroup

Batch = dict[str, Any]
Objective = Callable[[Any, Batch, ProcessGroup | None], dict[str, Tensor]]

# Loss scaling for fp16 (Micikevicius et al. 2018, arXiv 1710.03740), with torch.amp's constants.
FIRST_LOSS_SCALE = 2.0**16
LOSS_SCALE_DOUBLES_AFTER = 2000


class ZeroConfig(Config):
    """What the ranks share out among each other (Rajbhandari et al. 2020, arXiv 1910.02054)."""

    stage: int = Field(
        0,
        ge=0,
        le=3,
        description="0 nothing, 1 optimizer states, 2 gradients as well, 3 parameters as well; one process runs 0",
    )


class EngineConfig(Config):
    """How one optimizer step is computed, whatever is trained. Keys are DeepSpeed's own where it has them."""

    train_batch_size: int = Field(gt=0, description="samples of one optimizer step, over all ranks")
    train_micro_batch_size_per_gpu: int | None = Field(
        None, gt=0, description="samples of one forward pass on one rank; None: the whole share of the rank"
    )
    gradient_clipping: float = Field(1.0, ge=0, description="largest L2 norm of the joint gradient; 0: not clipped")
    zero_optimization: Annotated[ZeroConfig, Neutral()] = Field(ZeroConfig(), description="what ranks share out")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the arithmetic (autocast); weights, gradients and optimizer states stay fp32"
    )

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """Rows of one forward pass on one rank, and forward passes of one optimizer step.

        Raises:
            ConfigError: the batch does not divide evenly.
        """
        share, left = divmod(self.train_batch_size, world_size)
        micro = self.train_micro_batch_size_per_gpu or share
        if left or share % micro:
            raise ConfigError(
                f"train_batch_size {self.train_batch_size} does not divide into {world_size} rank(s)"
                + (f" x train_micro_batch_size_per_gpu {micro}" if self.train_micro_batch_size_per_gpu else "")
            )
        return micro, share // micro

    def samples_per_fetch(self, world_size: int) -> int:
        """Rows over all ranks of what a loader yields at a time: the `batch_size` to build it with."""
        return self.micro_batches(world_size)[0] * world_size


def zero_stage(config: EngineConfig, world_size: int) -> int:
    """The ZeRO stage that is run: one process has nobody to share with, and stage 1 would halve its speed."""
    return config.zero_optimization.stage if world_size > 1 else 0


def deepspeed_config(config: EngineConfig, world_size: int, numel: int, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's settings in full: whatever changed its default between releases is written out.

    Args:
        config: ours.
        world_size: ranks.
        numel: trainable numbers, to keep buffers no larger than what they hold.
        on_gpu: whether collectives can overlap with the backward pass.
    """
    micro, accumulation = config.micro_batches(world_size)
    stage = zero_stage(config, world_size)
    bucket = min(-(-numel // 16) * 16, 200_000_000)  # numbers; DeepSpeed wants them even
    return {
        "train_batch_size": config.train_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        # At stage 0 DeepSpeed clips without telling the norm, so there we do it ourselves.
        "gradient_clipping": config.gradient_clipping if stage else 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            # Else each gradient is copied once more; on GPU that spares memory from being cut up.
            "contiguous_gradients": on_gpu or stage >= 2,
            "overlap_comm": on_gpu and stage >= 2,
            "reduce_scatter": True,
            "round_robin_gradients": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": min(bucket, 50_000_000),
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "sub_group_size": 1_000_000_000,
            "memory_efficient_linear": False,  # it would replace torch's own `linear` for the rest of the process
        },
        # Autocast is ours, inside the module: DeepSpeed keeps one fp32 path, at every stage.
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "dump_state": False,
        # Its throughput timer waits for the device at every step.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }


class _ModelWithLoss(nn.Module):
    """What DeepSpeed drives: it finds where to hook only in plain tensors and dicts, such as an objective returns."""

    def __init__(self, model: nn.Module, objective: Objective, runtime: Runtime, precision: str) -> None:
        super().__init__()
        self.model = model
        self._objective = objective
        self._group = runtime.group
        self._device_type = runtime.device.type
        self._autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.autocast(self._device_type, dtype=self._autocast, enabled=self._autocast is not None):
            return dict(self._objective(self.model(batch), batch, self._group))


class Engine:
    """Forward, backward and step of one training phase.

    Attributes:
        model: the model as the stage passed it.
        deepspeed: the engine underneath.
        base_optimizer: the torch optimizer that DeepSpeed drives.
        trainable: the parameters that it updates.
        stage: the ZeRO stage that is run.
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
        self.rank, self.world_size = runtime.rank, runtime.world_size
        self._config = config
        self.trainable = [p for group in groups for p in group["params"]]
        self.loss_scale = FIRST_LOSS_SCALE if config.precision == "fp16" else 1.0
        self.good_steps = 0  # since the loss scale last changed
        on_gpu = runtime.device.type == "cuda"
        numel = sum(p.numel() for p in self.trainable)
        settings = deepspeed_config(config, runtime.world_size, numel, on_gpu)
        module = _ModelWithLoss(model, objective, runtime, config.precision)
        self._parameters_before = {parameter: set(vars(parameter)) for parameter in model.parameters()}
        self.base_optimizer = optimizer(groups)
        with contextlib.ExitStack() as environment:
            environment.enter_context(_local_rank(runtime.local_rank))
            self.deepspeed = _initialize(module, self.base_optimizer, settings, runtime)
            self._environment = environment.pop_all()
        for group in self.deepspeed.optimizer.param_groups:
            group["peak_lr"] = group["lr"] * group.get("lr_scale", 1.0)
        if runtime.world_size == 1 and self.stage == 0:
            # With one process there is nothing to reduce; DeepSpeed would still copy every gradient twice.
            self.deepspeed.enable_backward_allreduce = False
        self._apply_loss_scale()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Run model and objective on one micro-batch; `loss` in the result is not scaled yet."""
        return self.deepspeed(batch)

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradient; at the last of a step, gradients are averaged over ranks."""
        self.deepspeed.backward(loss * self.loss_scale if self.stage == 0 else loss)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # counts the micro-batch; updates nothing

    def step(self, lr_factor: float) -> float:
        """Clip, update, and forget the gradients; a gradient that is not finite updates nothing.

        Args:
            lr_factor: multiplies the peak learning rates, from the schedule.
        Returns:
            The L2 norm of the joint gradient before clipping; inf or nan where nothing was updated.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        norm = self._step_unpartitioned() if self.stage == 0 else self._step_partitioned()
        if self._config.precision == "fp16":
            self._adapt_loss_scale(math.isfinite(norm))
        return norm

    @property
    def lr(self) -> float:
        """The highest learning rate of the last step."""
        return max(group["lr"] for group in self.deepspeed.optimizer.param_groups)

    def _step_unpartitioned(self) -> float:
        grads = []
        for parameter in self.trainable:
            if parameter.grad is None:  # as DeepSpeed does when it reduces: a parameter no loss reached still decays
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
        norm = float(torch.nn.utils.get_total_norm(grads)) / self.loss_scale
        if not math.isfinite(norm):
            self.deepspeed.zero_grad()
            self.deepspeed.micro_steps += 1
            return norm
        limit = self._config.gradient_clipping
        shrink = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        if shrink / self.loss_scale != 1.0:
            torch._foreach_mul_(grads, shrink / self.loss_scale)
        self.deepspeed.step()
        return norm

    def _step_partitioned(self) -> float:
        self.deepspeed.step()
        norm = float(self.deepspeed.get_global_grad_norm())
        return norm if self.deepspeed.was_step_applied() else math.inf

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
