"""Objectives: `objective(output, batch, group) -> {"loss": ..., metrics}`, one file each, chosen by name.

`group` is the ranks that form the joint batch (None: this process alone). The mean of `loss` over the ranks is the
joint loss, so that gradients averaged over ranks are those of one process on the joint batch. Every metric is a 0-d
tensor; nothing is read to the host.

An objective whose micro-batches do not all count alike (one a token, say) has a method `weight(batch)` as well: what
this rank's micro-batch counts for, read from the batch on the host. One of several parts that count differently has
`weights(batch)` instead: part -> what this rank's micro-batch counts for in it. It multiplies each of these parts, loss
and metrics, by `weight_in(batch, part)` itself; parts that it does not name count alike.

An objective with options is a `Config` that can be called; one with the defaults is registered. `needs`, where it has
that, names what it reads of the output beyond the two embeddings and the scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Union

from torch import Tensor
from torch.distributed import ProcessGroup

from mmfoundry.pipeline.config import Config, parse
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.registry import Registry
from mmfoundry.pipeline.updates import WEIGHTS

# A weight, or options with the weight among them: `{info_nce: 1.0}`, `{siglip: {weight: 0.5, tile: 512}}`
ObjectiveWeights = Mapping[str, Union[float, Mapping[str, Any]]]  # noqa: UP007  (read at run time by pydantic)


class Objective(Protocol):
    """What a trainer minimises."""

    def __call__(self, output: Any, batch: Mapping[str, Any], group: ProcessGroup | None = None) -> dict[str, Tensor]:
        """Give `loss`, a 0-d tensor with a gradient, and any metrics, 0-d tensors without."""
        ...


OBJECTIVES: Registry[Objective] = Registry("objective", package="mmfoundry.models.objectives")


def objective_with(name: str, options: Mapping[str, Any]) -> Objective:
    """An objective of the registry with these options in place of the defaults.

    Raises:
        UnknownName: there is no such objective.
        ConfigError: it has no such option; the key is named.
    """
    default = OBJECTIVES[name]
    if not options:
        return default
    if not isinstance(default, Config):
        raise ConfigError(f"objectives.{name} has no options, but {', '.join(options)} is given")
    built: Any = parse(type(default), options, source="objectives", prefix=f"objectives.{name}")
    return built


def weighted_sum(weights: ObjectiveWeights) -> Objective:
    """One objective from several: the sum of their losses, each times its weight.

    Args:
        weights: objective name -> weight, or a mapping of its options, `weight` (1 where it is left out) among them.
            Of a single objective of weight 1 the metrics keep their names; otherwise each metric, and each part's own
            loss, is named `<objective>/<metric>`.

    Raises:
        UnknownName: a name is not in the registry.
        ConfigError: an option is not known, or has an impossible value.
        ValueError: there is no objective, or one that weighs its micro-batches is to be summed with others, which
            count theirs alike.
    """
    if not weights:
        raise ValueError("name at least one objective")
    parts: dict[str, Objective] = {}
    factors: dict[str, float] = {}
    for name, given in weights.items():
        options = dict(given) if isinstance(given, Mapping) else {"weight": given}
        factors[name] = _factor(name, options.pop("weight", 1.0))
        parts[name] = objective_with(name, options)
    if list(factors.values()) == [1.0]:
        return next(iter(parts.values()))
    weighing = [name for name, part in parts.items() if hasattr(part, "weight")]
    if weighing and len(parts) > 1:
        raise ValueError(f"{weighing[0]} weighs its micro-batches, so it cannot be summed with other objectives")
    return _Sum(parts, factors)


def _factor(name: str, weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ConfigError(f"objectives.{name}: the weight should be a number, not {weight!r}")
    return float(weight)


class _Sum:
    """What `weighted_sum` gives for several objectives."""

    def __init__(self, parts: Mapping[str, Objective], factors: Mapping[str, float]) -> None:
        self._parts, self._factors = parts, factors
        self.needs = frozenset().union(*(needs(part) for part in parts.values()))

    def weights(self, batch: Mapping[str, Any]) -> dict[str, float]:
        return {key: count for part in self._parts.values() for key, count in weights_of(part, batch).items()}

    def __call__(self, output: Any, batch: Mapping[str, Any], group: ProcessGroup | None = None) -> dict[str, Tensor]:
        values = {name: part(output, batch, group) for name, part in self._parts.items()}
        total = sum(self._factors[name] * each["loss"] for name, each in values.items())
        named = {f"{name}/{key}": value.detach() for name, each in values.items() for key, value in each.items()}
        return {"loss": total, **named}  # type: ignore[dict-item]  # sum() of tensors is a tensor


def weights_of(objective: Objective, batch: Mapping[str, Any]) -> dict[str, float]:
    """What a batch on the host counts for in each part of an objective that counts by itself."""
    found: dict[str, float] = getattr(objective, "weights", lambda batch: {})(batch)
    return found


def weight_in(batch: Mapping[str, Any], part: str) -> Tensor | float:
    """What a part of the loss of this micro-batch is multiplied with; 1 where a step has only one."""
    found: Tensor | float = batch.get(WEIGHTS, {}).get(part, 1.0)
    return found


def needs(objective: Objective) -> frozenset[str]:
    """What an objective reads of the model's output, or of the batch, that not every run has."""
    return getattr(objective, "needs", frozenset())


def check_pairs(output: Any) -> tuple[Tensor, Tensor]:
    """The two embeddings of an output, (b, D) each.

    Raises:
        ValueError: they do not pair row by row.
    """
    image_bD, text_bD = output.image_bD, output.text_bD
    if image_bD.shape != text_bD.shape:
        raise ValueError(f"images {tuple(image_bD.shape)} and texts {tuple(text_bD.shape)} must pair row by row")
    return image_bD, text_bD
