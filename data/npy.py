"""Arrays that lie in shards as `.npy` members: numbers from strangers, so read with care and never unpickled."""

from __future__ import annotations

import io
import math

import numpy as np

from mmfoundry.data.decode import UnreadableSample

NPY = ".npy"  # ends a member's extension: `vit_h_image.npy`
MAX_NPY_BYTES = 4 << 20
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npy(data: bytes, name: str) -> np.ndarray:
    """The numbers of a `.npy` file, fp16 or fp32, as float32.

    The header is checked against the size before anything of that size is made.

    Args:
        data: the file.
        name: of it, for the message.

    Raises:
        UnreadableSample: it is over `MAX_NPY_BYTES`, cut short or of another kind.
    """
    if len(data) > MAX_NPY_BYTES:
        raise UnreadableSample("too many bytes", f"{name} has {len(data)} > {MAX_NPY_BYTES}")
    file = io.BytesIO(data)
    try:
        shape, is_fortran, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
    except (ValueError, KeyError) as error:
        raise UnreadableSample("damaged array", f"{name} has no npy header of version 1 or 2") from error
    if dtype.kind != "f" or dtype.itemsize not in (2, 4):
        raise UnreadableSample("damaged array", f"{name} has numbers of type {dtype}, not float16 or float32")
    start, expected = file.tell(), math.prod(shape) * dtype.itemsize
    if len(data) - start != expected:
        raise UnreadableSample("damaged array", f"{name} has {len(data) - start} bytes for {shape} of {dtype}")
    numbers = np.frombuffer(data, dtype, math.prod(shape), start)
    return numbers.reshape(shape, order="F" if is_fortran else "C").astype(np.float32)
