"""What has the host wait for a device, counted on any machine: reads of numbers, and copies that block."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmfoundry.pipeline.engine import is_one_on_the_host

aten = torch.ops.aten
NEVER_WAITS = is_one_on_the_host.__name__  # looks at numbers on the host only
READS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.cpu,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
    torch.equal,
    torch.nonzero,
    torch.masked_select,
    torch.unique,
}
OPERATIONS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}


class Waits:
    """Notes whatever would wait for a GPU in the code under test, as `<file>:<function> <what>`, in order.

    On a GPU a number that is read, a tensor made from host data on the device, or a copy that is not `non_blocking`
    waits until all that was queued is done.

    Attributes:
        found: what was noted so far; whoever tests may add marks of their own.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self._modes = (_Functions(self), _Operations(self))

    def __enter__(self) -> Waits:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def note(self, what: str, also_by_torch: bool = True) -> None:
        """Note a wait, with the first caller outside torch; one of the tests themselves is left out."""
        frame = sys._getframe(2)
        while frame.f_back is not None:
            name = frame.f_code.co_filename
            if name != __file__ and "torch" not in name.split("/"):
                break
            if name != __file__ and not also_by_torch:
                return
            frame = frame.f_back
        parts = frame.f_code.co_filename.split("/")
        if "tests" not in parts and frame.f_code.co_name != NEVER_WAITS:
            package = "deepspeed/" if "deepspeed" in parts else ""
            self.found.append(f"{package}{parts[-1]}:{frame.f_code.co_name} {what}")


class _Functions(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", str(function))
        if function in READS:
            self._waits.note(name)
        elif function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            self._waits.note(f"{name} on the device")
        elif function is Tensor.to and not kwargs.get("non_blocking") and True not in args[2:]:
            target = kwargs.get("device", args[1] if len(args) > 1 else None)
            if isinstance(target, torch.device | str):
                # torch's own copies go to where a tensor is already
                self._waits.note("copy that blocks", also_by_torch=False)
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in OPERATIONS:
            self._waits.note(str(function))
        return function(*args, **(kwargs or {}))
