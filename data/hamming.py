"""Which of many hashes are within a few bits of each other: all pairs, exactly, without comparing all with all.

The bits are dealt out to radius + t bands. Two hashes within the radius differ in at most `radius` bands, so they agree
in at least t (pigeonhole), and only rows that agree in t bands are compared. Of few rows t is 1, which takes few sorts
of large groups; of many it is 2, which takes many sorts of small ones (Norouzi et al. 2012, "Fast search in Hamming
space with multi-index hashing", spend the same by flipping bits).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations

import numpy as np

from mmfoundry.data.uids import mixed

_MANY = 100_000  # rows from which two bands must agree
_LARGE = 40  # bits; past this radius there are too many pairs of bands
_PAIRS_AT_ONCE = 1 << 24
_ODD = np.uint64(0x9E3779B97F4A7C15)  # a product with it has its high bits from all bits of the other factor
PairTest = Callable[[np.ndarray, np.ndarray], np.ndarray]  # two arrays of rows -> bool: do they belong together?


def leaders(hashes: np.ndarray, radius: int) -> np.ndarray:
    """Which rows stay when each is dropped that is near an earlier one that stays.

    Args:
        hashes: uint8 (n, bytes), in order of precedence.
        radius: bits; at most this distance is near.
    Returns:
        bool (n,).
    """
    stays = np.zeros(len(hashes), bool)
    if len(hashes):
        # later rows of an equal hash are near their first one, or near what that one is near: they never stay
        first = _first_of_each(_as_words(hashes))
        stays[first] = stay_in_turn(len(first), near_pairs(hashes[first], radius))
    return stays


def stay_in_turn(count: int, pairs: np.ndarray) -> np.ndarray:
    """Which of `count` rows stay when they are taken one after the other.

    Args:
        count: rows.
        pairs: int64 (pairs, 2): later row, earlier row that is near; sorted.
    Returns:
        bool (count,): False for a row that is near an earlier one that stays.
    """
    stays = np.ones(count, bool)
    later, start = np.unique(pairs[:, 0], return_index=True)
    stop = np.append(start[1:], len(pairs))[: len(start)]
    for row, begin, end in zip(later.tolist(), start.tolist(), stop.tolist(), strict=True):
        stays[row] = not stays[pairs[begin:end, 1]].any()
    return stays


def near_pairs(hashes: np.ndarray, radius: int, agreeing: int | None = None) -> np.ndarray:
    """All pairs of rows within `radius` bits of each other.

    Args:
        hashes: uint8 (n, bytes).
        radius: bits, less than a hash has.
        agreeing: bands in which compared rows agree; changes the time it takes, never the pairs. None: by their number.
    Returns:
        int64 (pairs, 2), later row before earlier row, sorted, without repeats.
    """
    if agreeing is None:
        agreeing = 1 if len(hashes) < _MANY or radius > _LARGE else 2
    agreeing = min(agreeing, hashes.shape[1] * 8 - radius)
    words = _as_words(hashes)
    bands = [_band(words, hashes.shape[1] * 8, radius + agreeing, band) for band in range(radius + agreeing)]
    return pairs_that_pass(keys_of(bands, agreeing), lambda one, other: within(words, one, other, radius))


def keys_of(bands: Sequence[np.ndarray], agreeing: int) -> Iterator[np.ndarray]:
    """A key for each choice of `agreeing` bands; rows that agree in so many of them share one.

    Args:
        bands: each uint32 (n,).
        agreeing: 1 or more.
    Returns:
        Each uint64 (n,).
    """
    for some in combinations(bands, agreeing):
        yield some[0].astype(np.uint64) if agreeing == 1 else _joined(some)


def pairs_that_pass(keys: Iterable[np.ndarray], test: PairTest) -> np.ndarray:
    """Pairs of rows that share one of several keys and pass a test.

    Args:
        keys: each uint64 (n,), one a row.
        test: two arrays of rows -> bool, whether they belong together.
    Returns:
        int64 (pairs, 2), later row before earlier row, sorted, without repeats.
    """
    found: list[np.ndarray] = [np.empty(0, np.uint64)]
    unsorted = 0
    for key in keys:
        for rows, others in _sharing(key):
            passed = test(rows, others)
            earlier, later = np.minimum(rows, others)[passed], np.maximum(rows, others)[passed]
            found.append(later.astype(np.uint64) << np.uint64(32) | earlier.astype(np.uint64))
            unsorted += len(earlier)
        if unsorted > _PAIRS_AT_ONCE:  # near pairs share many keys
            found, unsorted = [np.unique(np.concatenate(found))], 0
    pairs = np.unique(np.concatenate(found))
    return np.stack([pairs >> np.uint64(32), pairs & np.uint64(0xFFFFFFFF)], axis=1).astype(np.int64)


def within(words: np.ndarray, rows: np.ndarray, others: np.ndarray, radius: int) -> np.ndarray:
    """Whether hashes differ in at most `radius` bits.

    Args:
        words: uint64 (words, n): the hashes, one a column.
        rows: row numbers.
        others: as many.
        radius: bits.
    """
    alive, passed = np.arange(len(rows)), np.zeros(len(rows), bool)
    distance = np.zeros(len(rows), np.int32)
    for word in words:  # most pairs are told apart by their first words
        distance += np.bitwise_count(word[rows] ^ word[others])
        near = distance <= radius
        if not near.all():
            alive, rows, others, distance = alive[near], rows[near], others[near], distance[near]
    passed[alive] = True
    return passed


def _sharing(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows of equal keys, and a few others, in arrays of at most n."""
    bits = np.uint64(max(len(keys) - 1, 1).bit_length())
    # a key's hash and its row in one number, since plain numbers are sorted many times faster than rows by key
    mask = (np.uint64(1) << bits) - np.uint64(1)
    ordered = np.sort((keys * _ODD) & ~mask | np.arange(len(keys), dtype=np.uint64))
    group = ordered >> bits
    start, ahead = np.flatnonzero(group[1:] == group[:-1]), 1
    while len(start):  # each turn pairs a row with the one `ahead` places on in its group; groups that end drop out
        yield (ordered[start] & mask).astype(np.int64), (ordered[start + ahead] & mask).astype(np.int64)
        ahead += 1
        start = start[start + ahead < len(ordered)]
        start = start[group[start] == group[start + ahead]]


def _first_of_each(words: np.ndarray) -> np.ndarray:
    """The first row of each different hash, in order."""
    mark = mixed(*words)
    _, first, of = np.unique(mark, return_index=True, return_inverse=True)
    other = np.flatnonzero((words != words[:, first[of]]).any(axis=0))  # different hashes of one mark: in practice none
    return np.union1d(first, other)


def _band(words: np.ndarray, bits: int, bands: int, band: int) -> np.ndarray:
    """The bits of one band of each row as uint32; equal where they are equal, and seldom elsewhere."""
    places = range(band, bits, bands)
    key = np.zeros(words.shape[1], np.uint64)
    for count, place in enumerate(places, start=1):
        bit = words[place // 64] >> np.uint64(place % 64)
        key = key << np.uint64(1) | (bit & np.uint64(1))
        if count % 32 == 0 and count < len(places):
            key = mixed(key) >> np.uint64(32)
    return (key if len(places) <= 32 else mixed(key) >> np.uint64(32)).astype(np.uint32)


def _joined(bands: Sequence[np.ndarray]) -> np.ndarray:
    if len(bands) == 2:
        return bands[0].astype(np.uint64) << np.uint64(32) | bands[1]
    return mixed(*bands)


def _as_words(hashes: np.ndarray) -> np.ndarray:
    """uint8 (n, bytes) -> uint64 (words, n), padded with zeros."""
    padded = np.pad(hashes, ((0, 0), (0, -hashes.shape[1] % 8)))
    return np.ascontiguousarray(np.ascontiguousarray(padded).view(np.uint64).T)
