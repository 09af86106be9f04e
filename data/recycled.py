"""Memory for large arrays that is used again once the last array or tensor on it is gone.

What the C library gets from the system for a block of tens of megabytes, it gives back when the block is freed; the
next batch then has every page mapped and cleared anew, which costs more than writing a normalised image into it.
"""

from __future__ import annotations

import math
import weakref
from threading import Lock

import numpy as np

_LARGE = 1 << 20  # bytes; what is smaller the C library keeps


class Recycled:
    """A source of uninitialised arrays; safe for threads. It holds as many blocks as were in use at one time."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[Recycled], tuple[()]]:
        return Recycled, ()  # another process has memory of its own

    def empty(self, shape: tuple[int, ...], dtype: np.dtype | type[np.generic]) -> np.ndarray:
        """An array like `np.empty`'s; what it lies in is used again when it and all views of it are gone."""
        kind = np.dtype(dtype)
        count = math.prod(shape)
        if count * kind.itemsize < _LARGE:
            return np.empty(shape, kind)
        memory = self._memory(count * kind.itemsize)
        # views of this array refer to it, not to `memory`: what they refer to ends at a buffer that is no array
        array = np.frombuffer(memory.data, kind, count)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array.reshape(shape)

    def _memory(self, num_bytes: int) -> np.ndarray:
        """The smallest free block that fits, of at most twice the size; else a new one in the place of an old one."""
        with self._lock:  # blocks that come free meanwhile are appended, which moves none
            fitting = [
                (block.nbytes, place)
                for place, block in enumerate(list(self._free))
                if num_bytes <= block.nbytes <= 2 * num_bytes
            ]
            if fitting:
                return self._free.pop(min(fitting)[1])
            if self._free:
                del self._free[0]
        return np.empty(num_bytes, np.uint8)
