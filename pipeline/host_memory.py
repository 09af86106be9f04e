"""How the C library hands out memory on the CPU."""

from __future__ import annotations

import ctypes

# glibc's mallopt parameters (malloc.h)
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGE = 2**31 - 1  # bytes; the parameters are C ints


def keep_freed_memory() -> bool:
    """Have this process keep the memory that it frees, for its next allocation, until it ends.

    glibc gives large blocks back to the system as they are freed. A training step on the CPU allocates the same large
    activations as the step before, and the system has to map and clear each of their pages anew: about 5% of a step
    of a small CLIP. PyTorch has an allocator of its own on GPUs only.

    Returns:
        Whether it was done; False where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl and macOS have no mallopt, Windows no CDLL(None)
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGE)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGE))
