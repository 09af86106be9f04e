"""uids as numbers: small to keep, quick to compare, and the seed of every draw.

A uid is 32 hex digits. As two unsigned 64-bit numbers, "high" (its first 16 digits) and "low", it takes 16 bytes, and
pairs of numbers have the order of the strings.
"""

import binascii

import numpy as np
import polars as pl

DIGITS = 32
_AT_ONCE = 1 << 15  # uids, whose text stays in the cache
_TEXT = pl.Array(pl.UInt64, DIGITS // 8)  # the bytes of a uid as they stand, whatever numbers they make
# of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators"): a bijection that looks random
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def high_low(uid: str = "uid") -> tuple[pl.Expr, pl.Expr]:
    """The two numbers of a column of uids, named "high" and "low"."""
    column = pl.col(uid)
    return (
        column.str.slice(0, 16).str.to_integer(base=16, dtype=pl.UInt64).alias("high"),
        column.str.slice(16).str.to_integer(base=16, dtype=pl.UInt64).alias("low"),
    )


def numbers_of(uids: pl.Series) -> pl.DataFrame | None:
    """The two numbers of each uid, "high" and "low"; None where one is not 32 hex digits, of either case.

    Text is decoded many uids at a time: several times as fast as `high_low`, which looks at one after the other.
    """
    if uids.null_count() or not (uids.str.len_bytes() == DIGITS).all():
        return None
    high, low = np.empty((2, len(uids)), np.uint64)
    for start in range(0, len(uids), _AT_ONCE):
        some = uids[start : start + _AT_ONCE].cast(pl.Binary)
        digits = some.bin.reinterpret(dtype=_TEXT).to_numpy()  # one after the other, with nothing in between
        try:
            halves = np.frombuffer(binascii.unhexlify(digits.data.cast("B")), ">u8").reshape(-1, 2)
        except ValueError:
            return None
        high[start : start + len(some)], low[start : start + len(some)] = halves[:, 0], halves[:, 1]
    return pl.DataFrame({"high": high, "low": low})


def mixed(*numbers: np.ndarray | int, seed: int = 0) -> np.ndarray:
    """One random-looking number for each tuple of numbers: equal ones for equal tuples, on any machine.

    Args:
        numbers: unsigned or non-negative, at least one of them an array; they are broadcast. Their order counts.
        seed: another seed gives numbers that have nothing to do with these.
    Returns:
        uint64.
    """
    state = _scrambled(np.asarray(seed, np.uint64))
    for number in numbers:
        state = _scrambled(state ^ np.asarray(number).astype(np.uint64))
    return state


def uniform(*numbers: np.ndarray | int, seed: int = 0) -> np.ndarray:
    """As `mixed`, as float64 in [0, 1), multiples of 2**-53."""
    return (mixed(*numbers, seed=seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _scrambled(state: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # numbers wrap, as they should
        state = state + _STEP
        state = (state ^ (state >> np.uint64(30))) * _FACTORS[0]
        state = (state ^ (state >> np.uint64(27))) * _FACTORS[1]
        return state ^ (state >> np.uint64(31))
