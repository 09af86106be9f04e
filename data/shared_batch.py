"""One batch in one piece of memory that two processes see: arrays in place, strings and lengths beside them.

The memory is an anonymous file (`memfd`), not a named one in /dev/shm: it needs no room there, it is gone with the last
process that has it open, however that process ends, and nobody else can open it.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import tempfile
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from mmfoundry.data.gather import Batch, as_array, is_tensor
from mmfoundry.data.ragged import Ragged
from mmfoundry.pipeline.errors import ConfigError

_ALIGN = 64  # bytes: a cache line, and what vector instructions like
_HEAD = 64  # bytes kept free for the position that is being worked on
_GROW = 1 << 20  # bytes: a slot grows to a multiple of this
Layout = list[dict[str, Any]]  # one entry a field; JSON


def anonymous_file() -> int:
    """A descriptor of a file without a name, in memory where the system allows it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mmfoundry-batch", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Slot:
    """Memory for one batch at a time; it grows to the largest that it ever held.

    Both processes have a `Slot` on the same file. The worker allocates from it, the consumer views it: arrays that
    were handed out keep their mapping alive, also past a growth.
    """

    def __init__(self, descriptor: int | None = None):
        """Take over a descriptor; None makes a new file."""
        self.descriptor = anonymous_file() if descriptor is None else descriptor
        self._bytes: np.ndarray = np.empty(0, np.uint8)
        self._used = _HEAD
        # address of an array that lies here -> its offset; the array is kept, or its address could come to be another's
        self._placed: dict[int, tuple[int, np.ndarray]] = {}
        self._fit(os.fstat(self.descriptor).st_size)

    def close(self) -> None:
        """Let go of the file; what is mapped stays until the last array is gone."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1
        self._bytes = np.empty(0, np.uint8)

    def __del__(self) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes mapped."""
        return len(self._bytes)

    def mark(self, position: int) -> None:
        """Leave word which position is worked on now; read by the other process should this one die."""
        self._need(_HEAD)
        self._bytes[:8].view(np.int64)[0] = position + 1

    def marked(self) -> int | None:
        """The position that was worked on last; None if there was none."""
        self._fit(os.fstat(self.descriptor).st_size)
        return int(self._bytes[:8].view(np.int64)[0]) - 1 if self.size and self._bytes[:8].any() else None

    def clear(self) -> None:
        """Begin a new batch."""
        self._used = _HEAD
        self._placed.clear()
        self._bytes[:8] = 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A new array of the present batch, behind the last one."""
        offset = -(-self._used // _ALIGN) * _ALIGN
        nbytes = math.prod(shape) * dtype.itemsize
        self._used = offset + nbytes
        self._need(self._used)
        array = _view(self._bytes, offset, shape, dtype)
        if nbytes:
            self._placed[_address(array)] = offset, array
        return array

    def view(self, size: int) -> np.ndarray:
        """All bytes, as an array of its own that lives as long as any view of it; maps anew where the file grew."""
        self._fit(size)
        return np.frombuffer(self._bytes.base, np.uint8)  # type: ignore[arg-type]

    def _need(self, size: int) -> None:
        if size > self.size:
            # a quarter to spare, so that captions a little longer than the last ones do not map it anew
            size = -(-(size + size // 4) // _GROW) * _GROW
            os.ftruncate(self.descriptor, size)
            self._fit(size)

    def _fit(self, size: int) -> None:
        if size > self.size:
            self._bytes = np.frombuffer(mmap.mmap(self.descriptor, size), np.uint8)

    def place(self, array: np.ndarray) -> int:
        """Where an array of the present batch lies; copied here if it lies elsewhere."""
        if array.nbytes and array.flags.c_contiguous:
            found = self._placed.get(_address(array))
            if found is not None:
                return found[0]
        inside = self.empty(array.shape, array.dtype)
        inside[...] = array
        return self._placed[_address(inside)][0] if inside.nbytes else 0


def pack(batch: Batch, slot: Slot) -> Layout:
    """Describe a batch whose arrays lie in a slot, moving there what does not yet.

    Raises:
        ConfigError: a field holds what cannot leave a process: neither arrays, tensors, `Ragged`, strings nor JSON.
    """
    return [{"name": name, **_packed(name, value, slot)} for name, value in batch.items()]


def _packed(name: str, value: Any, slot: Slot) -> dict[str, Any]:
    if isinstance(value, Ragged):
        return {"kind": "ragged", "parts": [_array(name, value.values, slot), _array(name, value.starts, slot)]}
    if isinstance(value, np.ndarray) or is_tensor(value):
        return {"kind": "array", "parts": [_array(name, value, slot)]}
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        encoded = [each.encode("utf-8", "surrogatepass") for each in value]
        starts = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        text = np.frombuffer(b"".join(encoded), np.uint8)
        return {"kind": "strings", "parts": [_array(name, text, slot), _array(name, starts, slot)]}
    if not _is_json(value):
        raise ConfigError(
            f"the batch's {name!r} cannot leave a worker process: give arrays, numbers, strings or JSON values, "
            "or read with workers: thread"
        )
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    return {"kind": "json", "parts": [_array(name, text, slot)]}


def _array(name: str, value: Any, slot: Slot) -> dict[str, Any]:
    array = as_array(value)
    if array.dtype.hasobject:
        raise ConfigError(f"the batch's {name!r} is an array of objects, which cannot leave a worker process")
    return {"dtype": array.dtype.str, "shape": list(array.shape), "offset": slot.place(array)}


def unpack(layout: Layout, data: np.ndarray) -> Batch:
    """The batch that `pack` described, its arrays views of `data` (`Slot.view`)."""
    batch: Batch = {}
    for field in layout:
        arrays = [_view(data, part["offset"], tuple(part["shape"]), np.dtype(part["dtype"])) for part in field["parts"]]
        batch[field["name"]] = _KINDS[field["kind"]](*arrays)
    return batch


def _strings(text: np.ndarray, starts: np.ndarray) -> list[str]:
    data, ends = text.tobytes(), starts.tolist()
    return [data[a:b].decode("utf-8", "surrogatepass") for a, b in pairwise(ends)]


_KINDS: dict[str, Callable[..., Any]] = {
    "array": lambda array: array,
    "ragged": Ragged,
    "strings": _strings,
    "json": lambda text: json.loads(text.tobytes()),
}


def _is_json(value: Any) -> bool:
    """Whether a value comes back from JSON as it went in: a tuple would be a list, a number as a key a string."""
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(type(key) is str and _is_json(each) for key, each in value.items())
    return value is None or type(value) in (str, int, float, bool)


def _view(data: np.ndarray, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return data[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
