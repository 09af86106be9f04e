"""uid subsets in DataComp's format: a sorted numpy array of dtype "u8,u8", one entry a uid.

A uid is 32 hex digits; its first 16 are the first number, its last 16 the second. DataComp's resharder takes the file
(`--subset-file`), and so does any tool that reads its published subsets. Ten million uids take 160 MB so, as text three
times that: what is large stays in numbers.
"""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl

from mmfoundry.data.uids import high_low
from mmfoundry.pipeline.artifact import write_atomic
from mmfoundry.pipeline.errors import DamagedInput, MissingInput

SUBSET_TYPE = np.dtype("u8,u8")
_AT_ONCE = 1 << 20  # uids turned into text in one go


def pairs_of(uids: Iterable[str]) -> np.ndarray:
    """Each uid as its two numbers, in the order given.

    Args:
        uids: 32 lower-case hex digits each; fastest as a polars series.
    Raises:
        ValueError: one is not 32 lower-case hex digits.
    """
    texts = uids if isinstance(uids, pl.Series) else pl.Series(list(uids), dtype=pl.String)
    fits = texts.str.contains("^[0-9a-f]{32}$").fill_null(False)
    if not fits.all():
        raise ValueError(f"{texts.filter(~fits)[0]!r} is not a uid: 32 lower-case hex digits")
    return pairs_of_numbers(texts.to_frame("uid").select(*high_low()))


def pairs_of_numbers(table: pl.DataFrame) -> np.ndarray:
    """As `pairs_of`, of uids that are numbers already: "high" and "low"."""
    pairs = np.empty(table.height, SUBSET_TYPE)
    for field, half in zip(pairs.dtype.names or (), ("high", "low"), strict=True):
        pairs[field] = table[half].to_numpy()
    return pairs


def uids_of(pairs: np.ndarray) -> pl.Series:
    """The uids of pairs of numbers, as text, in their order."""
    first, second = pairs.dtype.names or ("f0", "f1")
    parts = []
    for start in range(0, len(pairs), _AT_ONCE):
        part = pairs[start : start + _AT_ONCE]
        halves = np.empty((len(part), 2), ">u8")
        halves[:, 0], halves[:, 1] = part[first], part[second]
        parts.append(pl.Series([halves.tobytes().hex("\n", 16)]).str.split("\n").explode())
    return pl.concat([pl.Series("uid", [], pl.String), *(part.alias("uid") for part in parts)])


def to_subset(uids: Iterable[str] | np.ndarray) -> np.ndarray:
    """Sorted array of uids.

    Args:
        uids: 32 hex digits each, or an array of `pairs_of`; a repeated one stays repeated (DataComp's way to say
            "take it twice").
    Raises:
        ValueError: one is not 32 hex digits.
    """
    pairs = uids if isinstance(uids, np.ndarray) else pairs_of(uids)
    first, second = SUBSET_TYPE.names or ("f0", "f1")
    # numpy compares such pairs one by one in Python's manner: ten times slower
    table = pl.DataFrame({"high": pairs[first], "low": pairs[second]})
    ordered = table.sort("high", maintain_order=True)  # quick where what is put together here is sorted already
    high = ordered["high"].to_numpy()
    # to sort by both takes twice the time, and uids that share a half are rare
    return pairs_of_numbers(table.sort("high", "low") if (high[1:] == high[:-1]).any() else ordered)


def write_subset(uids: Iterable[str] | np.ndarray, path: Path) -> None:
    """Write uids into a stage's output as DataComp does, whole or not at all; arguments, errors as for `to_subset`."""
    buffer = io.BytesIO()
    np.save(buffer, to_subset(uids), allow_pickle=False)
    write_atomic(path, buffer.getvalue(), sync=False)


def load_subset(path: Path) -> np.ndarray:
    """The pairs of a subset file, mapped, in its order: sorted, unless whoever wrote it did not.

    Raises:
        MissingInput: there is no such file.
        DamagedInput: not a numpy array of that type.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise MissingInput(f"{path}: no such file; a subset is written by the filter stage, as subset.npy") from error
    except (ValueError, EOFError, OSError) as error:
        raise DamagedInput(f"{path}: not a numpy file: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != SUBSET_TYPE:
        kind = getattr(array, "dtype", "an archive")
        raise DamagedInput(f"{path}: a subset is one row of type u8,u8, not {kind}")
    return array


def read_subset(path: Path) -> list[str]:
    """The uids of a subset file as text, in its order; errors as for `load_subset`."""
    return uids_of(load_subset(path)).to_list()


def times_in(subset: np.ndarray, uids: Iterable[str]) -> np.ndarray:
    """How often each uid is in a subset: 0 where it is not, more than once where it is to be taken so often.

    Args:
        subset: sorted pairs.
        uids: 32 hex digits each.
    Returns:
        int64, one count a uid, in their order.
    Raises:
        ValueError: one is not 32 hex digits.
    """
    asked = pairs_of(uids)
    return np.searchsorted(subset, asked, "right") - np.searchsorted(subset, asked, "left")


def is_sorted(pairs: np.ndarray) -> bool:
    """Whether pairs are in the order that looking them up needs."""
    first, second = pairs.dtype.names or ("f0", "f1")
    for start in range(0, len(pairs), _AT_ONCE):
        high, low = (np.ascontiguousarray(pairs[start : start + _AT_ONCE + 1][name]) for name in (first, second))
        if ((high[:-1] > high[1:]) | ((high[:-1] == high[1:]) & (low[:-1] > low[1:]))).any():
            return False
    return True
