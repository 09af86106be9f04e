"""Declares the two operators without which `import torchvision` fails beside a CPU-only torch.

The wheels of torchvision on a plain package index are built against the CUDA build of torch. Beside a CPU-only torch
their compiled library does not load, `torchvision::nms` and `torchvision::qnms` are never defined, and torchvision
ends with `operator torchvision::nms does not exist` when it registers their shapes at import. Nothing in mmfoundry
calls these operators (they are for object detection), but open_clip and the image processors of transformers import
torchvision. A definition without a kernel is enough for that: calling the operator still fails, and says so.

Call `declare_missing_ops()` before anything imports torchvision, open_clip or transformers' image processors.
"""

import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMAS = {
    "torchvision::nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[torch.library.Library] = []  # a definition lives as long as its Library object


def declare_missing_ops() -> list[str]:
    """Define `torchvision::nms` and `torchvision::qnms` where torchvision's own library cannot.

    Does nothing where torchvision is absent, already imported, or its compiled library loads. Safe to call again.

    Returns:
        The operators that this call declared.
    """
    if "torchvision" in sys.modules:
        return []
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations or _own_library_loads(spec.submodule_search_locations[0]):
        return []
    missing = [name for name in _SCHEMAS if not torch._C._jit_get_schemas_for_operator(name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(_SCHEMAS[name])
        _declared.append(library)
    return missing


def _own_library_loads(folder: str) -> bool:
    """Load the library that torchvision loads at import (a second load is free); False where it cannot be."""
    for path in sorted(Path(folder).glob("_C.*")):
        if path.suffix in (".so", ".pyd", ".dylib"):
            try:
                torch.ops.load_library(str(path))
            except OSError:
                continue
            return True
    return False
