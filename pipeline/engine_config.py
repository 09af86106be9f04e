"""What an engine is told: typed keys, named as DeepSpeed names them, and DeepSpeed's settings in full."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mmfoundry.pipeline.config import Config, Neutral
from mmfoundry.pipeline.deepspeed_file import merge_file
from mmfoundry.pipeline.errors import ConfigError

LARGEST_BUCKET = 200_000_000  # numbers in one collective


class OffloadConfig(Config):
    """Where ZeRO keeps what it took off the device (Ren et al. 2021, arXiv 2101.06840)."""

    device: Literal["none", "cpu", "nvme"] = Field("none", description="none: on the device of the rank")
    nvme_path: str | None = Field(None, description="folder on a fast local disk; for nvme only")
    pin_memory: bool = Field(False, description="page-locked host memory: quicker to copy, not to be swapped out")

    @model_validator(mode="after")
    def _has_path(self) -> OffloadConfig:
        if (self.device == "nvme") != (self.nvme_path is not None):
            raise ValueError("nvme_path belongs to device nvme, and device nvme needs it")
        return self


class ZeroConfig(Config):
    """What the ranks share out among each other (Rajbhandari et al. 2020, arXiv 1910.02054)."""

    stage: int = Field(
        0,
        ge=0,
        le=3,
        description="0 nothing, 1 optimizer states, 2 gradients as well, 3 parameters as well; one process runs 0",
    )
    offload_optimizer: OffloadConfig = Field(
        OffloadConfig(), description="where optimizer states live and are updated; stage 1 or more"
    )
    offload_param: OffloadConfig = Field(OffloadConfig(), description="where parameters wait; stage 3")

    @model_validator(mode="after")
    def _offloads_what_it_cut(self) -> ZeroConfig:
        if self.offload_optimizer.device != "none" and self.stage < 1:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3")
        if self.offload_optimizer.device == "nvme" and self.stage < 3:
            raise ValueError("offload_optimizer.device nvme needs stage 3")
        if self.offload_param.device != "none" and self.stage < 3:
            raise ValueError("offload_param needs stage 3")
        return self

    @property
    def offloads(self) -> bool:
        """Whether anything is kept off the device."""
        return self.offload_optimizer.device != "none" or self.offload_param.device != "none"


class EngineConfig(Config):
    """How one optimizer step is computed, whatever is trained. Keys are DeepSpeed's own where it has them."""

    train_batch_size: int = Field(gt=0, description="samples of one optimizer step, over all ranks")
    train_micro_batch_size_per_gpu: int | None = Field(
        None, gt=0, description="samples that one loss of one rank sees; None: the whole share of the rank"
    )
    grad_cache_chunk_size: Annotated[int | None, Neutral()] = Field(
        None,
        gt=0,
        description="samples of one forward pass on one rank: the loss still sees all of the micro-batch, in the "
        "memory of so many samples, for one more forward pass; None: all at once",
    )
    gradient_clipping: float = Field(1.0, ge=0, description="largest L2 norm of the joint gradient; 0: not clipped")
    zero_optimization: Annotated[ZeroConfig, Neutral()] = Field(ZeroConfig(), description="what ranks share out")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the arithmetic (autocast); weights, gradients and optimizer states stay fp32"
    )
    gradient_checkpointing: Annotated[bool, Neutral()] = Field(
        False, description="blocks keep their inputs only and are computed again in the backward pass: less memory"
    )
    torch_compile: Annotated[bool, Neutral()] = Field(
        False, description="compile each block of the model with torch.compile; ZeRO stages 0 to 2"
    )
    torch_compile_backend: Annotated[str, Neutral()] = Field("inductor", description="of torch.compile")
    deepspeed: Annotated[str | None, Neutral()] = Field(
        None, description="a DeepSpeed JSON whose settings are added to those made from the keys here"
    )

    @model_validator(mode="after")
    def _compiles_whole_parameters(self) -> EngineConfig:
        if self.torch_compile and self.zero_optimization.stage == 3:
            raise ValueError("torch_compile does not go with ZeRO stage 3, which gathers weights between operations")
        return self

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """Rows of one loss on one rank, and losses of one optimizer step.

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

    def chunks(self, world_size: int) -> int:
        """Forward passes that the rows of one loss are cut into; 1 without a gradient cache.

        Raises:
            ConfigError: the rows do not divide evenly.
        """
        micro, _ = self.micro_batches(world_size)
        chunk = min(self.grad_cache_chunk_size or micro, micro)
        if micro % chunk:
            raise ConfigError(f"grad_cache_chunk_size {chunk} does not divide the {micro} samples of a rank's loss")
        return micro // chunk

    def samples_per_fetch(self, world_size: int) -> int:
        """Rows over all ranks of what a loader yields at a time: the `batch_size` to build it with."""
        return self.micro_batches(world_size)[0] * world_size


def zero_stage(config: EngineConfig, world_size: int) -> int:
    """The ZeRO stage that is run.

    One process has nobody to share with, and stage 1 would halve its speed; but what is to be kept off its device goes
    through the stage that does so.
    """
    return config.zero_optimization.stage if world_size > 1 or config.zero_optimization.offloads else 0


def deepspeed_config(
    config: EngineConfig, world_size: int, numel: int = LARGEST_BUCKET, on_gpu: bool = False
) -> dict[str, Any]:
    """DeepSpeed's settings in full: whatever changed its default between releases is written out.

    Args:
        config: ours.
        world_size: ranks.
        numel: trainable numbers, to keep buffers no larger than what they hold.
        on_gpu: whether collectives can overlap with the backward pass.

    Raises:
        ConfigError: the batch does not divide, or the user's own file contradicts `config`.
        MissingInput: the user's own file is not there.
    """
    micro, accumulation = config.micro_batches(world_size)
    chunks = config.chunks(world_size)
    stage = zero_stage(config, world_size)
    zero: dict[str, Any] = {
        "stage": stage,
        # Else each gradient is copied once more; on GPU that spares memory from being cut up.
        "contiguous_gradients": on_gpu or stage >= 2,
        "overlap_comm": on_gpu and stage >= 2,
        "reduce_scatter": True,
        "round_robin_gradients": False,
        "memory_efficient_linear": False,  # it would replace torch's own `linear` for the rest of the process
    } | _buffers(numel)
    for name in ("offload_optimizer", "offload_param"):
        offload: OffloadConfig = getattr(config.zero_optimization, name)
        if offload.device != "none" and stage:
            zero[name] = offload.model_dump(exclude_none=True)
    settings = {
        "train_batch_size": config.train_batch_size,
        "train_micro_batch_size_per_gpu": micro // chunks,
        "gradient_accumulation_steps": accumulation * chunks,
        # At stage 0 DeepSpeed clips without telling the norm, so there we do it ourselves.
        "gradient_clipping": config.gradient_clipping if stage else 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it would be compiled first; torch's own runs on the host as well
        "zero_optimization": zero,
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
    return merge_file(settings, config.deepspeed, _typed(config, world_size)) if config.deepspeed else settings


def engines_in(config: Config, prefix: str = "") -> Iterator[tuple[str, EngineConfig]]:
    """The training phases of a stage's config, by dotted key."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, EngineConfig):
            yield f"{prefix}{name}", value
        elif isinstance(value, Config):
            yield from engines_in(value, f"{prefix}{name}.")


def _buffers(numel: int) -> dict[str, Any]:
    bucket = min(-(-numel // 16) * 16, LARGEST_BUCKET)  # DeepSpeed wants them even
    return {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": min(bucket, 50_000_000),
        "stage3_param_persistence_threshold": 100_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "sub_group_size": 1_000_000_000,
    }


def _typed(config: EngineConfig, world_size: int) -> dict[str, tuple[str, Any]]:
    """DeepSpeed's dotted key -> our key for the same, and what it says: what a user's file may repeat, not change."""
    micro, accumulation = config.micro_batches(world_size)
    chunks = config.chunks(world_size)
    zero = config.zero_optimization
    typed: dict[str, tuple[str, Any]] = {
        "train_batch_size": ("train_batch_size", config.train_batch_size),
        "train_micro_batch_size_per_gpu": ("train_micro_batch_size_per_gpu", micro // chunks),
        "gradient_accumulation_steps": ("train_micro_batch_size_per_gpu", accumulation * chunks),
        "gradient_clipping": ("gradient_clipping", config.gradient_clipping),
        "zero_optimization.stage": ("zero_optimization.stage", zero.stage),
        "fp16.enabled": ("precision", config.precision == "fp16"),
        "bf16.enabled": ("precision", config.precision == "bf16"),
    }
    for name in ("offload_optimizer", "offload_param"):
        offload: OffloadConfig = getattr(zero, name)
        for key, value in offload.model_dump().items():
            typed[f"zero_optimization.{name}.{key}"] = (f"zero_optimization.{name}.{key}", value)
    optimizer = getattr(config, "optimizer", None)  # a trainer's config has one
    if optimizer is not None:
        typed["optimizer.type"] = ("optimizer.type", optimizer.type)
        for key in ("lr", "betas", "eps", "weight_decay"):
            typed[f"optimizer.params.{key}"] = (f"optimizer.{key}", getattr(optimizer, key))
        if optimizer.momentum is not None:
            typed["optimizer.params.momentum"] = ("optimizer.momentum", optimizer.momentum)
        if optimizer.type != "adamw":  # what DeepSpeed leaves on the device, AdamW updates, whatever the rest is given
            typed["zero_optimization.offload_optimizer.ratio"] = (f"optimizer.type {optimizer.type}", 1.0)
    return typed
