"""Which of many codes are near, differing in at most a few places: exactly, without comparing all with all.

A place is a bit of a perceptual hash, or one of the hashes of a MinHash signature. Places are dealt out to radius + t
bands. Two near codes differ in at most `radius` bands, so they agree in at least t (pigeonhole), and only rows that
agree in t bands are compared. Of few rows t is 1, which takes few turns over large groups; of many it is 2, which
takes many turns over small ones (Norouzi et al. 2012, "Fast search in Hamming space with multi-index hashing", spend
the same by flipping bits). A pair counts in the first t bands in which it agrees, so that bands may be searched apart.

Which rows stay, of those that are each dropped for an earlier one that stays, is settled prefix after prefix, each 16
times as long as the one before: where near rows come in crowds, what the prefix settles is taken out before the rest
are compared with each other, and a crowd of g rows costs about g comparisons, not g * g (Blelloch et al. 2012, "Greedy
sequential maximal independent set and matching are parallel on average", whose order is random, as that of uids is).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmfoundry.data.uids import mixed

MANY = 100_000  # rows from which two bands must agree
_FIRST = 1 << 13  # rows of the shortest prefix
_GROWTH = 16  # of prefixes
_CROWDED = 8.0  # near pairs a row from which it pays to take out first what is near settled rows
_ROWS_AT_ONCE = 1 << 15  # whose bands stay in the cache
_PAIRS_AT_ONCE = 1 << 15
_SPARE_BITS = 2  # of a table, so that few rows of different keys meet
_ROUNDS = 20  # of settling all rows at once
_ODD = np.uint64(0x9E3779B97F4A7C15)  # a product with it has its high bits from all bits of the other factor
_HALF = np.uint64(32)
_ROW = np.uint64(0xFFFFFFFF)
_ALL_BUT_HIGHEST = np.uint64(0x7FFF7FFF7FFF7FFF)  # of each of four numbers of 16 bits


@dataclass(frozen=True)
class Nearness:
    """When two codes, rows of uint64 (n, words), are near.

    Attributes:
        radius: places in which they may differ, less than there are.
        places: of a code; what is left of its words is 0.
        place_bits: 1, or 16 for places that are numbers.
    """

    radius: int
    places: int
    place_bits: Literal[1, 16] = 1

    @property
    def num_words(self) -> int:
        """Of a code."""
        return -(-self.places * self.place_bits // 64)

    def num_bands(self, rows: int) -> int:
        """The bands of so many rows; near codes agree in all but `radius` of them.

        Their number changes the time it takes to find near codes, never which are found.
        """
        return min(self.radius + (2 if rows >= MANY else 1), self.places)

    def bands(self, codes: np.ndarray, count: int) -> np.ndarray:
        """A number for each band of each row, equal where the bands are, and seldom elsewhere.

        Args:
            codes: uint64 (n, words); some thousand rows at once are quickest.
            count: of bands. Place p belongs to band p % count: places side by side often depend on each other.
        Returns:
            (n, count), of `band_type`.
        """
        if self.place_bits == 1:
            values: np.ndarray = np.unpackbits(codes.view(np.uint8), axis=1)[:, : self.places]
        else:
            values = codes.view(np.uint16)[:, : self.places]
        found = np.zeros((len(codes), count), np.uint64)
        for start in range(0, self.places, count):
            some = values[:, start : start + count]
            state = found[:, : some.shape[1]]
            state += some
            state += np.uint64(1)
            state *= _ODD
            state ^= state >> np.uint64(29)
        dtype = np.dtype(band_type(count))
        return ((found * _ODD) >> np.uint64(64 - 8 * dtype.itemsize)).astype(dtype)

    def near(self, words: np.ndarray, ones: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Those of many pairs whose codes are near.

        Args:
            words: uint64 (words, n), the codes in columns.
            ones: columns.
            others: as many, each the other of a pair.
        """
        distance: np.ndarray = np.zeros(len(ones), np.uint16)
        for number, word in enumerate(words):
            differ = word[ones] ^ word[others]
            if self.place_bits == 16:  # one bit for each number that is not 0
                differ = (((differ & _ALL_BUT_HIGHEST) + _ALL_BUT_HIGHEST) | differ) & ~_ALL_BUT_HIGHEST
            distance += np.bitwise_count(differ)
            if number % 2 or number == len(words) - 1:  # most pairs are told apart by their first words
                near = np.flatnonzero(distance <= self.radius)
                if len(near) < len(ones):
                    ones, others, distance = ones[near], others[near], distance[near]
        return ones, others


@dataclass(frozen=True)
class Asked:
    """Which pairs a search is to find.

    Attributes:
        rows: uint32, ascending: those that take part.
        first: the later row of a pair is this one or a later one; all before it are settled.
        settled_only: the earlier row of a pair is a settled one.
    """

    rows: np.ndarray
    first: int = 0
    settled_only: bool = False


Search = Callable[[Asked], np.ndarray]  # near pairs in order, as `pairs_of_band` has them, of all bands


def leaders(codes: np.ndarray, nearness: Nearness) -> np.ndarray:
    """Which rows stay when each is dropped that is near an earlier one that stays.

    Args:
        codes: uint64 (n, words), in order of precedence.
        nearness: of two.
    Returns:
        bool (n,).
    """
    stays = np.zeros(len(codes), bool)
    if len(codes):
        # later rows of an equal code are near their first one, or near what that one is near: they never stay
        first = _first_of_each(codes)
        stays[first] = settled(len(first), _search_of(codes[first], nearness))
    return stays


def near_pairs(codes: np.ndarray, nearness: Nearness) -> np.ndarray:
    """All pairs of rows that are near each other.

    Args:
        codes: uint64 (n, words).
        nearness: of two.
    Returns:
        int64 (pairs, 2), later row before earlier row, sorted, without repeats.
    """
    pairs = _search_of(codes, nearness)(Asked(np.arange(len(codes), dtype=np.uint32)))
    return np.stack(_rows_of(pairs), axis=1)


def _search_of(codes: np.ndarray, nearness: Nearness) -> Search:
    return search_in(codes, bands_of(codes, nearness), nearness)


def bands_of(codes: np.ndarray, nearness: Nearness) -> np.ndarray:
    """The bands in which codes are searched; see `Nearness.bands`."""
    count = nearness.num_bands(len(codes))
    bands: np.ndarray = np.empty((len(codes), count), band_type(count))
    fill_bands(bands, codes, nearness)
    return bands


def fill_bands(bands: np.ndarray, codes: np.ndarray, nearness: Nearness) -> None:
    """Write the bands of codes into an array, some thousand rows at once."""
    for start in range(0, len(codes), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        bands[some] = nearness.bands(np.asarray(codes[some]), bands.shape[1])


def band_type(count: int) -> type:
    """Of the numbers of so many bands: at most 64 bytes a row, or two a band."""
    return np.uint32 if count <= 16 else np.uint16


def search_in(codes: np.ndarray, bands: np.ndarray, nearness: Nearness) -> Search:
    """A search for near rows, band after band."""

    def search(asked: Asked) -> np.ndarray:
        every = range(bands.shape[1])
        return np.sort(np.concatenate([pairs_of_band(codes, bands, nearness, band, asked) for band in every]))

    return search


def settled(count: int, search: Search) -> np.ndarray:
    """Which of `count` rows stay when each is dropped that is near an earlier one that stays.

    Args:
        count: rows.
        search: for near rows.
    Returns:
        bool (count,).
    """
    stays = np.ones(count, bool)
    stops = [count]
    while stops[0] > _FIRST:
        stops.insert(0, stops[0] // _GROWTH)
    first, found, crowded = 0, 0, False
    for stop in stops:
        # pairs grow as the square of rows do; once in crowds, rows stay in crowds
        crowded = crowded or (first > 0 and found * (stop / first) ** 2 > _CROWDED * stop)
        if crowded:
            later, _ = _rows_of(search(Asked(_rows_that(stays, 0, stop), first, settled_only=True)))
            stays[later] = False
        pairs = search(Asked(_rows_that(stays, first if crowded else 0, stop), first))
        _settle(stays, *_rows_of(pairs))
        first, found = stop, found + len(pairs)
    return stays


def _rows_that(stays: np.ndarray, start: int, stop: int) -> np.ndarray:
    return (start + np.flatnonzero(stays[start:stop])).astype(np.uint32)


def _rows_of(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Later rows and earlier rows, int64."""
    return (pairs >> _HALF).astype(np.int64), (pairs & _ROW).astype(np.int64)


def _settle(stays: np.ndarray, later: np.ndarray, earlier: np.ndarray) -> None:
    """Drop rows, one after the other, that are near an earlier one that stays; pairs are in order of the later row."""
    waits = np.zeros(len(stays), bool)
    waits[later] = True
    for _ in range(_ROUNDS):  # all at once whose earlier ones are known
        stays[later[~waits[earlier] & stays[earlier]]] = False
        open_ = stays[later] & stays[earlier]  # pairs that may still say something
        later, earlier = later[open_], earlier[open_]
        waits[:] = False
        waits[later] = True
        if not len(later):
            return
    for row, other in zip(later.tolist(), earlier.tolist(), strict=True):  # long chains
        if stays[other]:
            stays[row] = False


def pairs_of_band(codes: np.ndarray, bands: np.ndarray, nearness: Nearness, band: int, asked: Asked) -> np.ndarray:
    """Near pairs that agree in a band and in none before it.

    Args:
        codes: uint64 (n, words).
        bands: (n, bands) from `Nearness.bands`.
        nearness: of two.
        band: number of the band.
        asked: which pairs.
    Returns:
        uint64: the later row in the upper half, the earlier one in the lower, in no order, without repeats.
    """
    pairs_agree = bands.shape[1] - nearness.radius > 1
    found = [np.empty(0, np.uint64)]
    for members, group in _groups(bands, band, asked):
        own, words = bands[members], np.ascontiguousarray(codes[members].T)
        is_new = members >= asked.first if asked.settled_only else None
        for other in range(band + 1, bands.shape[1]) if pairs_agree else [band]:
            key = (group << _HALF | own[:, other]) * _ODD
            for one, two in _meetings(key, is_new):
                one, two = nearness.near(words, one, two)
                agree = own[one, : other + 1] == own[two, : other + 1]
                first_time = agree[:, band] & agree[:, other] & (agree.sum(axis=1) == 1 + pairs_agree)
                one, two = members[one[first_time]], members[two[first_time]]
                later = np.maximum(one, two)
                pairs = later << _HALF | np.minimum(one, two)
                found.append(pairs[later >= asked.first])
    return np.concatenate(found)


def _groups(bands: np.ndarray, band: int, asked: Asked) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows that agree in a band with one that they may be paired with, some whole groups at once.

    Returns:
        Rows, group by group; and for each a number of its group. Both uint64.
    """
    key = bands[asked.rows, band].astype(np.uint64)
    key <<= _HALF
    key |= asked.rows
    key.sort()  # plain numbers are sorted many times faster than rows by key
    begins = np.concatenate([[0], 1 + np.flatnonzero((key[1:] ^ key[:-1]) >> _HALF)])[: len(key)]
    key &= _ROW
    sizes = np.diff(begins, append=len(key))
    worth = (sizes > 1) & (key[begins + sizes - 1] >= asked.first)  # its last row is the latest
    if asked.settled_only:
        worth &= key[begins] < asked.first
    begins, sizes = begins[worth], sizes[worth]
    ends = np.cumsum(sizes)
    done = 0
    while done < len(ends):
        before = ends[done] - sizes[done]
        upto = max(int(np.searchsorted(ends, before + _ROWS_AT_ONCE, side="right")), done + 1)
        some = sizes[done:upto]
        ahead = np.arange(some.sum()) - np.repeat(ends[done:upto] - some - before, some)
        number = np.repeat(np.arange(len(some), dtype=np.uint64), some)
        yield key[np.repeat(begins[done:upto], some) + ahead], number
        done = upto


def _meetings(key: np.ndarray, is_new: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of rows with one key, and some others: places of the one and of the other, not in their order.

    Rows write their place into a table, where their key says; who reads another's there has met it. Whoever was read
    leaves, until nobody is left to be met. That takes one step a row and one a pair, and no sorting.

    Args:
        key: uint64, of which the high bits tell keys apart.
        is_new: where given, only those that are new read, and only those that are not write.
    """
    bits = max(len(key), 1).bit_length() + _SPARE_BITS
    slot = (key >> np.uint64(64 - bits)).astype(np.int64)
    table = np.full(1 << bits, -1)
    writers = np.arange(len(key)) if is_new is None else np.flatnonzero(~is_new)
    readers = writers if is_new is None else np.flatnonzero(is_new)
    ones, others, pairs = [], [], 0
    while len(writers) and len(readers):
        table[slot[writers]] = writers
        met = table[slot[readers]]
        meets = (met != readers) & (met >= 0)
        readers, met = readers[meets], met[meets]
        if is_new is None:
            writers = readers
        else:
            table[slot[writers]], left = -1, table[slot[writers]] != writers
            writers = writers[left]
        ones.append(readers)
        others.append(met)
        pairs += len(met)
        if pairs >= _PAIRS_AT_ONCE or not len(writers) or not len(readers):
            yield np.concatenate(ones), np.concatenate(others)
            ones, others, pairs = [], [], 0


def words_of(hashes: np.ndarray) -> np.ndarray:
    """uint8 (n, bytes) -> uint64 (n, words), padded with zeros."""
    return np.ascontiguousarray(np.pad(hashes, ((0, 0), (0, -hashes.shape[1] % 8)))).view(np.uint64)


def _first_of_each(codes: np.ndarray) -> np.ndarray:
    """The first row of each different code, in order."""
    _, first, of = np.unique(mixed(*codes.T), return_index=True, return_inverse=True)
    other = np.flatnonzero((codes != codes[first[of]]).any(axis=1))  # different codes of one mark: in practice none
    return np.union1d(first, other)
