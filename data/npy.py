"""Arrays that lie in shards as `.npy` members: numbers from strangers, so nothing in them is unpickled or evaluated."""

from __future__ import annotations

import math
import re

import numpy as np

from mmfoundry.data.decode import UnreadableSample

NPY = ".npy"  # ends a member's extension: `vit_h_image.npy`
MAX_NPY_BYTES = 4 << 20
_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {b"\1\0": 2, b"\2\0": 4}  # of the header's length, by version of the format
# The header as the format's description (NEP 1) has it; numpy's own reader evaluates it as a Python literal.
_HEADER = re.compile(
    rb"\{\s*'descr':\s*'([<>=]f[24])',\s*'fortran_order':\s*(True|False),"
    rb"\s*'shape':\s*\(((?:\d{1,9},?\s*){0,8})\),?\s*\}\s*"
)


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
    begin = 8 + _LENGTH_BYTES.get(data[6:8], 0)
    start = begin + int.from_bytes(data[8:begin], "little")
    header = _HEADER.fullmatch(data[begin:start])
    if not data.startswith(_MAGIC) or header is None:
        raise UnreadableSample("damaged array", f"{name} is no npy file of float16 or float32 numbers")
    dtype = np.dtype(header[1].decode())
    shape = tuple(int(size) for size in re.findall(rb"\d+", header[3]))
    if len(data) - start != math.prod(shape) * dtype.itemsize:
        raise UnreadableSample("damaged array", f"{name} has {len(data) - start} bytes for {shape} of {dtype}")
    numbers = np.frombuffer(data, dtype, math.prod(shape), start)
    return numbers.reshape(shape, order="F" if header[2] == b"True" else "C").astype(np.float32)
