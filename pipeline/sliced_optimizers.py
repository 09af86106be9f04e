"""Optimizers that look at whole tensors, over the partitions that ZeRO 1 to 3 leave of them.

Each stands for one of stage 0, takes over its groups and numbers, and makes the same updates. States are laid out as
the partitions are, so that checkpoints find them as they find AdamW's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmfoundry.pipeline.slices import Partition

STEP = "step"


class SlicedOptimizer(torch.optim.Optimizer):
    """Updates partitions; `bind` says what they hold, once the engine has cut the tensors up.

    Args:
        whole: the optimizer of stage 0.
    """

    # States that are a number a tensor, (tensors of the partition,), the same on every rank; others are partitions.
    per_tensor: tuple[str, ...] = ()

    def __init__(self, whole: torch.optim.Optimizer) -> None:
        super().__init__(whole.param_groups, whole.defaults)

    def bind(self, partitions: Iterable[Partition], device: torch.device) -> None:
        """Say what the partitions hold, and where tensors are computed with; every rank calls it.

        Args:
            partitions: all of them.
            device: of the collectives; partitions may lie on the host.
        """
        self.partitions = {partition.flat: partition for partition in partitions}
        self.device = device
        self._places = {
            cut.parameter: (partition, index)
            for partition in self.partitions.values()
            for index, cut in enumerate(partition.cuts)
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the partitions that have gradients; a collective. DeepSpeed calls it for one partition at a time."""
        if closure is not None:
            raise ValueError("DeepSpeed has no closures")
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._update(group, self.partitions[flat], flat.detach(), flat.grad, self.state[flat])
        return None

    def _update(
        self, group: dict[str, Any], partition: Partition, flat: Tensor, grad: Tensor, state: dict[str, Any]
    ) -> None:
        """Update one partition.

        Args:
            group: the optimizer's, with rates.
            partition: its layout.
            flat: its weights, (n,).
            grad: the joint gradient, clipped, (n,); left as it is.
            state: of the partition; empty at first.
        """
        raise NotImplementedError

    def shapes(self, parameter: nn.Parameter) -> dict[str, tuple[int, ...]]:
        """The states that are kept of a parameter and their shapes, whole; of its place in a partition, if shared."""
        partition, index = self._places[parameter]
        state = self.state.get(partition.flat, {})
        kept = [key for key, value in state.items() if isinstance(value, Tensor) and key != STEP]
        return {key: () if key in self.per_tensor else partition.cuts[index].shape for key in kept}

    def number(self, parameter: nn.Parameter, key: str) -> Tensor:
        """A state of `per_tensor`, ()."""
        partition, index = self._places[parameter]
        return self.state[partition.flat][key][index]

    def load(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Put this rank's share of a state where the next step finds it.

        Args:
            parameter: whose.
            key: of the state.
            value: whole, fp32.
        """
        partition, index = self._places[parameter]
        flat, cut, state = partition.flat.detach(), partition.cuts[index], self.state[partition.flat]
        if key in self.per_tensor:
            state.setdefault(key, flat.new_zeros(len(partition.cuts)))[index] = value
            return
        mine = partition.mine(cut, state.setdefault(key, torch.zeros_like(flat)))
        start = cut.start(partition.rank)
        mine.copy_(value.flatten()[start : start + mine.numel()])

    def load_count(self, count: float) -> None:
        """Say how many updates were made."""
        for flat in self.partitions:
            self.state[flat][STEP] = torch.tensor(count)

    def _summed(self, partition: Partition, sums: Tensor) -> Tensor:
        """What the ranks have of `sums` together; in place, where it lies on the device of the collectives."""
        joint = sums.to(self.device)
        dist.all_reduce(joint, group=partition.group)
        return joint.to(sums.device)


def kept(state: dict[str, Any], key: str, flat: Tensor) -> Tensor:
    """A state of a partition's layout; zeros at first."""
    if key not in state:
        state[key] = torch.zeros_like(flat)
    return state[key]


def count_update(state: dict[str, Any]) -> Tensor:
    """Count one more update of a partition; () how many there are now, on the host."""
    state[STEP] = state.get(STEP, torch.zeros(())) + 1
    return state[STEP]


class SlicedLamb(SlicedOptimizer):
    """timm's LAMB: both norms of a ratio are square roots of squares summed over slices and ranks."""

    def _update(
        self, group: dict[str, Any], partition: Partition, flat: Tensor, grad: Tensor, state: dict[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        count = int(count_update(state))
        average = kept(state, "exp_avg", flat).lerp_(grad, 1 - beta1)
        square = kept(state, "exp_avg_sq", flat).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        divisor = square.sqrt().div_((1 - beta2**count) ** 0.5).add_(group["eps"])
        update = (average / (1 - beta1**count)).div_(divisor)
        if not group["weight_decay"]:  # what is not decayed has the rate as it is
            flat.add_(update, alpha=-group["lr"])
            return
        update.add_(flat, alpha=group["weight_decay"])
        norms = [
            torch.stack([torch.linalg.vector_norm(partition.mine(cut, each)) for each in (flat, update)])
            for cut in partition.cuts
        ]
        weight, step = self._summed(partition, torch.stack(norms).double().square()).sqrt().unbind(1)
        ratios = torch.where((weight > 0) & (step > 0), weight / step, 1.0).float()
        for cut, ratio in zip(partition.cuts, ratios, strict=True):
            partition.mine(cut, update).mul_(ratio)
        flat.add_(update, alpha=-group["lr"])


class SlicedSgdSai(SlicedOptimizer):
    """SGD-SaI: the ratio of a tensor follows from sums over slices and ranks, once."""

    per_tensor = ("ratio",)

    def _update(
        self, group: dict[str, Any], partition: Partition, flat: Tensor, grad: Tensor, state: dict[str, Any]
    ) -> None:
        if "ratio" not in state:
            state["ratio"] = self._signal_to_noise(partition, grad, group["eps"])
        average = kept(state, "momentum_buffer", flat).lerp_(grad, 1 - group["momentum"])
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        for cut, ratio in zip(partition.cuts, state["ratio"], strict=True):
            partition.mine(cut, flat).sub_(partition.mine(cut, average) * (group["lr"] * ratio))

    def _signal_to_noise(self, partition: Partition, grad: Tensor, eps: float) -> Tensor:
        """(tensors,) as `sgd_sai.signal_to_noise`."""
        slices = [partition.mine(cut, grad).double() for cut in partition.cuts]
        first = torch.stack([torch.stack([each.sum(), each.square().sum()]) for each in slices])
        sums, squares = self._summed(partition, first).unbind(1)
        counts = sums.new_tensor([cut.numel for cut in partition.cuts])
        means = sums / counts
        spread = torch.stack([(each - mean).square().sum() for each, mean in zip(slices, means, strict=True)])
        deviations = (self._summed(partition, spread) / (counts - 1)).sqrt()
        has_rows = sums.new_tensor([len(cut.shape) > 1 and cut.shape[0] > 1 for cut in partition.cuts]) > 0
        norms = squares.sqrt()
        return torch.where(has_rows & (deviations > 0), norms / (deviations + eps), norms).float()
