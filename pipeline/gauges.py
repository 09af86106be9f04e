"""The numbers of a training that cost something to read, and are therefore read every few steps only.

Tokens and operations are counted on the host from shapes; norms stay on the device until a line of the log is due. So
nothing here waits for the device between two lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.engine import Engine
from mmfoundry.pipeline.partitions import gradient_norms, weight_norms

PARAM_NORM, GRAD_NORM = "param_norm", "grad_norm"  # in the log, with the part's name behind a slash


class Work(NamedTuple):
    """What a batch costs one rank.

    Attributes:
        tokens: positions that go through the model.
        flops: floating-point operations of forward and backward pass.
    """

    tokens: int
    flops: float


# Dense peak in TFLOP/s from the makers' data sheets: 16-bit, then fp32 without TF32. The first row all of whose words
# are in the device's name counts, so the special comes before the general.
PEAK_TFLOPS: tuple[tuple[tuple[str, ...], float, float], ...] = (
    (("B200",), 2250.0, 75.0),
    (("GH200",), 989.4, 66.9),
    (("H200", "NVL"), 835.5, 60.0),
    (("H200",), 989.4, 66.9),
    (("H100", "PCIe"), 756.0, 51.2),
    (("H100", "NVL"), 835.5, 60.0),
    (("H100",), 989.4, 66.9),
    (("A100",), 312.0, 19.5),
    (("L40S",), 362.05, 91.6),
    (("L40",), 181.05, 90.5),
    (("L4",), 121.0, 30.3),
    (("A10",), 125.0, 31.2),
    (("V100", "PCIE"), 112.0, 14.0),
    (("V100",), 125.0, 15.7),
    (("T4",), 65.0, 8.1),
    (("MI300X",), 1307.4, 163.4),
)


def peak_tflops(device_name: str, precision: str) -> float | None:
    """What a device can do at best in TFLOP/s; None for one that is not in the table.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        precision: "bf16", "fp16" or "fp32".
    """
    words = {word for word in device_name.replace("-", " ").upper().split()}
    for wanted, half, full in PEAK_TFLOPS:
        if {word.upper() for word in wanted} <= words:
            return full if precision == "fp32" else half
    return None


def norms_by_part(named: Iterable[tuple[str, Tensor]], kind: str) -> dict[str, Tensor]:
    """L2 norms of what belongs to each part of a model, 0-d, on their device.

    Args:
        named: full names and tensors; the part is the name up to the first dot.
        kind: begins the names of the results: `<kind>/<part>`.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in named:
        parts.setdefault(name.partition(".")[0], []).append(tensor)
    return {f"{kind}/{part}": torch.nn.utils.get_total_norm(tensors) for part, tensors in parts.items()}


def joint_norms(
    named: Sequence[tuple[str, nn.Parameter]],
    slices: Mapping[str, Iterable[tuple[nn.Parameter, Tensor]]],
    runtime: Runtime,
) -> dict[str, Tensor]:
    """As `norms_by_part`, where each rank has slices only: their squares are summed over ranks, in one collective.

    Args:
        named: full names and parameters, alike on all ranks.
        slices: what begins the names of the results -> parameters and the norms of this rank's slices of them.
        runtime: the ranks.
    """
    part_of = {id(parameter): name.partition(".")[0] for name, parameter in named}
    places = {f"{kind}/{part}": i for i, (kind, part) in enumerate(product(slices, dict.fromkeys(part_of.values())))}
    squares = torch.zeros(len(places), dtype=torch.float64, device=runtime.device)
    for kind, found in slices.items():
        for parameter, norm in found:
            place = places[f"{kind}/{part_of[id(parameter)]}"]
            squares[place] += norm.to(squares.device, torch.float64, non_blocking=True).square()
    if runtime.group is not None:
        dist.all_reduce(squares, group=runtime.group)
    return dict(zip(places, squares.sqrt().unbind(), strict=True))


def memory(device: torch.device) -> dict[str, float]:
    """Memory in GB: the most that tensors took so far on a GPU; of a CPU process what it holds now."""
    if device.type == "cuda":
        return {"memory_gb": torch.cuda.max_memory_allocated(device) / 1e9}
    return {"memory_gb": psutil.Process().memory_info().rss / 1e9}


class Gauges:
    """Counts work from one line of the log to the next, and reads norms, rates and memory for it.

    Args:
        model: what is trained.
        runtime: this process among the ranks; work is counted on this one and multiplied with their number.
        precision: of the arithmetic, for the peak that MFU is a share of.
        work: what a micro-batch costs one rank; None: tokens and operations are not reported.
    """

    def __init__(
        self, model: nn.Module, runtime: Runtime, precision: str, work: Callable[[Mapping[str, Any]], Work] | None
    ) -> None:
        self._model, self._runtime, self._work = model, runtime, work
        on_gpu = runtime.device.type == "cuda"
        self._peak = peak_tflops(torch.cuda.get_device_name(runtime.device), precision) if on_gpu else None
        self._tokens, self._flops = 0, 0.0
        self._norms: dict[str, Tensor] = {}

    def count(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Count the micro-batches of a step, still on the host."""
        if self._work is not None:
            for batch in batches:
                work = self._work(batch)
                self._tokens += work.tokens
                self._flops += work.flops

    def before_update(self, engine: Engine) -> None:
        """Take the norms of parameters and joint gradients; a collective from ZeRO stage 1 on.

        Args:
            engine: between the backward pass and the step.
        """
        self._norms = {}
        named = [(name, weight) for name, weight in self._model.named_parameters() if weight.requires_grad]
        if engine.stage:
            joint = joint_norms(
                named, {PARAM_NORM: weight_norms(engine), GRAD_NORM: gradient_norms(engine)}, self._runtime
            )
        elif self._runtime.is_main:  # who writes the log; each rank has all of them whole
            nothing = torch.zeros((), device=self._runtime.device)  # of a weight that no loss reached
            grads = ((name, nothing if weight.grad is None else weight.grad) for name, weight in named)
            joint = norms_by_part(((name, weight.detach()) for name, weight in named), PARAM_NORM)
            joint |= norms_by_part(grads, GRAD_NORM)
        else:
            return
        self._norms = {
            name: norm / engine.loss_scale if name.startswith(f"{GRAD_NORM}/") else norm for name, norm in joint.items()
        }

    def read(self, seconds: float, groups: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """The numbers of the window that ends now, and begin the next.

        Args:
            seconds: how long the window was.
            groups: the optimizer's, whose `lr` and `part` are read.
        """
        line = dict(
            zip(self._norms, torch.stack(list(self._norms.values())).tolist(), strict=True) if self._norms else ()
        )
        for group in groups:
            if "part" in group:
                key = f"lr/{group['part']}"
                line[key] = max(line.get(key, 0.0), float(group["lr"]))
        if self._work is not None:
            world = self._runtime.world_size
            tflops = self._flops / seconds / 1e12  # of one device
            line |= {"tokens_per_second": world * self._tokens / seconds, "tflops_per_device": tflops}
            if self._peak is not None:
                line["mfu"] = tflops / self._peak
        self.restart()
        return line | memory(self._runtime.device)

    def restart(self) -> None:
        """Begin a window: what was counted and not read is forgotten."""
        self._tokens, self._flops, self._norms = 0, 0.0, {}
