"""uid subsets in DataComp's format: a sorted numpy array of dtype "u8,u8", one entry a uid.

A uid is 32 hex digits; its first 16 are the first number, its last 16 the second. DataComp's resharder takes the file
(`--subset-file`), and so does any tool that reads its published subsets.
"""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mmfoundry.pipeline.artifact import write_atomic
from mmfoundry.pipeline.errors import DamagedInput

SUBSET_TYPE = np.dtype("u8,u8")


def to_subset(uids: Iterable[str]) -> np.ndarray:
    """Sorted array of uids.

    Args:
        uids: 32 hex digits each; a repeated one stays repeated (DataComp's way to say "take it twice").
    Raises:
        ValueError: one is not 32 hex digits.
    """
    pairs = [(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids if _is_uid(uid)]
    return np.sort(np.array(pairs, SUBSET_TYPE))


def write_subset(uids: Iterable[str], path: Path) -> None:
    """Write uids as DataComp does, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, to_subset(uids), allow_pickle=False)
    write_atomic(path, buffer.getvalue())


def read_subset(path: Path) -> list[str]:
    """The uids of a subset file, in its order.

    Raises:
        DamagedInput: not a numpy array of that type.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DamagedInput(f"{path}: not a numpy file: {error}") from error
    if array.dtype != SUBSET_TYPE:
        raise DamagedInput(f"{path}: a subset has the type u8,u8, not {array.dtype}")
    return [f"{high:016x}{low:016x}" for high, low in array.tolist()]


def _is_uid(uid: str) -> bool:
    if len(uid) != 32 or not set(uid) <= set("0123456789abcdef"):
        raise ValueError(f"{uid!r} is not a uid: 32 lower-case hex digits")
    return True
