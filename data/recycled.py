"""Memory for large arrays that is used again once the last array or tensor on it is gone.

What the C library gets from the system for a block of tens of megabytes, it gives back when the block is freed; the
next batch then has every page mapped and cleared anew, which costs more than writing a normalised image into it.
"""

from __future__ import annotations

import math
import weakref

import numpy as np

_LARGE = 1 << 20  # bytes; what is smaller the C library keeps


class Recycled:
    """A source of uninitialised arrays; safe for threads. It holds as much as was in use at one time."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

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
        """The free block that was used last if it is large enough; too small ones are let go."""
        while True:
            try:
                memory = self._free.pop()
            except IndexError:
                return np.empty(num_bytes, np.uint8)
            if memory.nbytes >= num_bytes:
                return memory
