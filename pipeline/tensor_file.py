"""Write a safetensors file one tensor at a time, so that a model larger than memory can be gathered and saved.

The format: the header's length (8 bytes, little-endian), a JSON header, then the tensors' bytes end to end.
https://huggingface.co/docs/safetensors gives it in full; its own writer wants all tensors at once, and hides the
operating system's errors in its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Spec = tuple[torch.dtype, tuple[int, ...]]


def file_order(specs: Mapping[str, Spec]) -> list[str]:
    """The order in which tensors are written: wide types first, so that each is aligned; then by name."""
    return sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))


def numel_bytes(specs: Mapping[str, Spec]) -> int:
    """What the tensors take, without the header."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in specs.values())


class TensorFile:
    """A safetensors file being written; end with `close` or `abandon`.

    Args:
        path: of the file.
        specs: type and shape of every tensor that will follow, in `file_order`.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec]) -> None:
        self.path = path
        header: dict[str, object] = {}
        self._waiting = file_order(specs)
        self._specs = specs
        end = 0
        for name in self._waiting:
            dtype, shape = specs[name]
            start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor.

        Raises:
            ValueError: it is not the next one, or not of the announced type and shape.
        """
        if (
            not self._waiting
            or name != self._waiting.pop(0)
            or self._specs[name] != (tensor.dtype, tuple(tensor.shape))
        ):
            raise ValueError(f"{name} {tensor.dtype} {tuple(tensor.shape)} is not what the header announced")
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Flush and sync; the file is complete once this returns.

        Raises:
            ValueError: announced tensors were not written.
        """
        if self._waiting:
            raise ValueError(f"{len(self._waiting)} announced tensors were not written")
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())

    def abandon(self) -> None:
        """Let go of a file that cannot be completed, for example on a full disk."""
        with contextlib.suppress(OSError):  # what is still buffered finds no room either
            self._file.close()
