"""Optimizer states by parameter name, whole, whatever the ZeRO stage cut them into.

Stage 0 keeps a state a parameter; stages 1 and 2 keep flat slices of a group of parameters, stage 3 slices of each
parameter, laid end to end. Getting is a collective: every rank asks for the same states in the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmfoundry.pipeline.engine import Engine
from mmfoundry.pipeline.sliced_optimizers import SlicedOptimizer

# What a rank's slice of a group counts its updates with; not cut, the same for every element.
COUNTER = "step"


def full_parameter(engine: Engine, parameter: nn.Parameter) -> Tensor:
    """The whole fp32 value of a trainable parameter."""
    if engine.stage == 3:
        return parameter._z3_optimizer.get_full_hp_param(parameter)  # type: ignore[attr-defined]
    return parameter.detach()


def state_keys(engine: Engine) -> list[str]:
    """What the optimizer keeps of any tensor, e.g. `exp_avg` and `exp_avg_sq`; empty before its first step."""
    return sorted({key for state in engine.base_optimizer.state.values() for key in _kept(state)})


def state_shapes(engine: Engine, parameter: nn.Parameter, keys: list[str]) -> dict[str, tuple[int, ...]]:
    """Which of `keys` the optimizer keeps of a trainable parameter, and the shape of each, whole.

    Optimizers that look at whole tensors may treat parameters differently, and keep numbers of a shape of their own;
    of others, ZeRO 1 to 3 keep all of them, in the parameter's shape.
    """
    optimizer = engine.base_optimizer
    if isinstance(optimizer, SlicedOptimizer):
        return optimizer.shapes(parameter)
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # at stage 3 the parameter itself is cut up
    if engine.stage:
        return dict.fromkeys(keys, shape)
    state = engine.base_optimizer.state.get(parameter, {})
    return {key: tuple(value.shape) for key, value in _kept(state).items()}


def _kept(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != COUNTER and isinstance(value, Tensor)}


def full_state(engine: Engine, parameter: nn.Parameter, key: str) -> Tensor:
    """The whole state `key` of a trainable parameter, in its shape."""
    if engine.stage == 0:
        return engine.base_optimizer.state[parameter][key]
    optimizer = engine.base_optimizer
    if isinstance(optimizer, SlicedOptimizer) and key in optimizer.per_tensor:
        return optimizer.number(parameter, key)
    if engine.stage == 3:
        return parameter._z3_optimizer.get_full_hp_param(parameter, key)  # type: ignore[attr-defined]
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is not None and key not in (mapping.optim_fragment or {}):
        _link(engine)
    return parameter.get_full_hp_param(key)  # type: ignore[attr-defined]


def updates(engine: Engine) -> float:
    """How many updates the optimizer has counted: what its bias correction reads."""
    return max((float(state.get(COUNTER, 0)) for state in engine.base_optimizer.state.values()), default=0.0)


def load_states(
    engine: Engine, keys: list[str], count: float, read: Callable[[nn.Parameter, str], Tensor | None]
) -> None:
    """Give a fresh engine the states of a checkpoint; no collective.

    Args:
        engine: before its first step.
        keys: as `state_keys` gave them.
        count: as `updates` gave it.
        read: the whole state of a trainable parameter; None where the optimizer kept none of this name.
    """
    optimizer, states = engine.deepspeed.optimizer, engine.base_optimizer.state
    if engine.stage == 0:
        for parameter in engine.trainable:
            found = {key: read(parameter, key) for key in keys}
            kept = {key: value for key, value in found.items() if value is not None}
            states[parameter] = {key: value.float().to(parameter.device).clone() for key, value in kept.items()}
            states[parameter][COUNTER] = torch.tensor(count, dtype=torch.float32, device=parameter.device)
        return
    if isinstance(engine.base_optimizer, SlicedOptimizer):
        engine.base_optimizer.load_count(count)
        for parameter, key in itertools.product(engine.trainable, keys):
            value = read(parameter, key)
            if value is not None:
                engine.base_optimizer.load(parameter, key, value.to(torch.float32))
        return
    slices = optimizer.fp32_partitioned_groups_flat if engine.stage == 3 else optimizer.single_partition_of_fp32_groups
    for slice_ in slices:
        state: dict[str, Any] = {key: torch.zeros_like(slice_) for key in keys}
        state[COUNTER] = torch.tensor(count, dtype=torch.float32, device=slice_.device)
        states[slice_] = state
    if engine.stage in (1, 2):
        _link(engine)
    for parameter in engine.trainable:
        for key in keys:
            value = read(parameter, key)
            if value is not None:
                _put(engine, parameter, key, value.to(torch.float32))


def _link(engine: Engine) -> None:
    """Tell each parameter where its slice of the states lies; DeepSpeed forgets all groups but the first."""
    optimizer = engine.deepspeed.optimizer
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


def _put(engine: Engine, parameter: nn.Parameter, key: str, value: Tensor) -> None:
    if engine.stage == 3:
        # DeepSpeed's own setter fails where the last rank's slice is padded.
        size = parameter.partition_numel()  # type: ignore[attr-defined]
        padded = value.new_zeros(size * engine.world_size)
        padded[: value.numel()] = value.flatten()
        mine = padded.narrow(0, size * engine.rank, size)
        parameter._z3_optimizer.set_local_hp_param(mine, parameter, key)  # type: ignore[attr-defined]
    else:
        parameter.set_full_hp_param(value, key)  # type: ignore[attr-defined]
