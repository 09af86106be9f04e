"""Objectives: `objective(output, batch, group) -> {"loss": ..., metrics}`, one file each, chosen by name.

`group` is the ranks that form the joint batch (None: this process alone). The mean of `loss` over the ranks is the
joint loss, so that gradients averaged over ranks are those of one process on the joint batch. Every metric is a 0-d
tensor; nothing is read to the host.

An objective whose micro-batches do not all count alike (one a token, say) has a method `weight(batch)` as well: what
this rank's micro-batch counts for, read from the batch on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor
from torch.distributed import ProcessGroup

from mmfoundry.pipeline.registry import Registry


class Objective(Protocol):
    """What a trainer minimises."""

    def __call__(self, output: Any, batch: Mapping[str, Any], group: ProcessGroup | None = None) -> dict[str, Tensor]:
        """Give `loss`, a 0-d tensor with a gradient, and any metrics, 0-d tensors without."""
        ...


OBJECTIVES: Registry[Objective] = Registry("objective", package="mmfoundry.models.objectives")


def weighted_sum(weights: Mapping[str, float]) -> Objective:
    """One objective from several: the sum of their losses, each times its weight.

    Args:
        weights: objective name -> weight. Of a single objective of weight 1 the metrics keep their names; otherwise
            each metric, and each part's own loss, is named `<objective>/<metric>`.

    Raises:
        UnknownName: a name is not in the registry.
        ValueError: there is no objective, or one that weighs its micro-batches is to be summed with others, which
            count theirs alike.
    """
    if not weights:
        raise ValueError("name at least one objective")
    parts = {name: OBJECTIVES[name] for name in weights}
    if list(weights.values()) == [1.0]:
        return next(iter(parts.values()))
    weighing = [name for name, part in parts.items() if hasattr(part, "weight")]
    if weighing and len(parts) > 1:
        raise ValueError(f"{weighing[0]} weighs its micro-batches, so it cannot be summed with other objectives")

    def objective(output: Any, batch: Mapping[str, Any], group: ProcessGroup | None = None) -> dict[str, Tensor]:
        values = {name: part(output, batch, group) for name, part in parts.items()}
        total = sum(weights[name] * each["loss"] for name, each in values.items())
        named = {f"{name}/{key}": value.detach() for name, each in values.items() for key, value in each.items()}
        return {"loss": total, **named}  # type: ignore[dict-item]  # sum() of tensors is a tensor

    return objective
