"""What can be done to the repeated blocks of a model, whatever they compute: compile them, compute them twice.

A model that allows it has a method `repeated_blocks()` that lists them: its transformer layers, say.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmfoundry.pipeline.engine_config import EngineConfig
from mmfoundry.pipeline.errors import ConfigError


def wrap_blocks(config: EngineConfig, model: nn.Module) -> Callable[[], None]:
    """Give a model's blocks the forward pass that a config asks for.

    A compiled block is compiled within what is computed again, so that compiling sees plain operations only. Dropout
    draws the same numbers both times.

    Returns:
        A function that takes it back.

    Raises:
        ConfigError: the model lists no blocks, but the config asks for something; or there is no such compiler.
    """
    if not (config.gradient_checkpointing or config.torch_compile):
        return lambda: None
    if not hasattr(model, "repeated_blocks"):
        key = "gradient_checkpointing" if config.gradient_checkpointing else "torch_compile"
        raise ConfigError(f"{key}: {type(model).__name__} does not say which blocks it repeats")
    if config.torch_compile and config.torch_compile_backend not in (known := torch.compiler.list_backends(())):
        raise ConfigError(
            f"torch_compile_backend: torch has no {config.torch_compile_backend!r}; it has {', '.join(known)}"
        )
    blocks: list[nn.Module] = list(model.repeated_blocks())  # type: ignore[operator]
    for block in blocks:
        forward = block.forward
        if config.torch_compile:
            forward = torch.compile(forward, backend=config.torch_compile_backend)
        if config.gradient_checkpointing:
            forward = functools.partial(_computed_twice, forward)
        block.forward = forward  # hides the method of the class, as long as it is there

    def unwrap() -> None:
        for block in blocks:
            del block.forward

    return unwrap


def _computed_twice(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
