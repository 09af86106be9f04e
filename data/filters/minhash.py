"""`caption_near_duplicate`: captions made of nearly the same words, by MinHash."""

import hashlib
import math
import re
from collections.abc import Sequence

import numpy as np
import polars as pl
from pydantic import Field

from mmfoundry.data.filters.base import FILTERS, PoolFilter
from mmfoundry.data.hamming import keys_of, pairs_that_pass, stay_in_turn
from mmfoundry.data.uids import high_low, mixed

NUM_HASHES = 64
_PAIRS_AT_ONCE = 1 << 18  # whose signatures are compared
_MANY = 100_000  # signatures from which two bands must agree
_FEW = 20  # hashes that may differ; past it there are too many pairs of bands
_WORD = re.compile(r"\w+")
_CAPTION = ("high", "low", "caption_index")


@FILTERS.register("caption_near_duplicate")
class CaptionNearDuplicate(PoolFilter):
    """Of captions made of nearly the same words, the one with the smallest uid stays.

    The similarity of two captions is that of their sets of n-grams of words (Jaccard: shared ones over all), estimated
    from 64 hashes (Broder 1997, "On the resemblance and containment of documents"), as Lee et al. (2022, arXiv
    2107.06499) do for documents, with 5-grams and 0.8. They miss some pairs, by locality sensitive hashing; here every
    pair whose hashes agree so often is found. Captions are taken in the order of uid and number; one is dropped if an
    earlier one that stays is similar. Words are letters and digits, whatever their case; a caption with fewer than n is
    one n-gram, one without words is compared as it is.
    """

    min_similarity: float = Field(0.8, gt=0, le=1, description="similarity from which two captions are called the same")
    words: int = Field(3, ge=1, le=20, description="words of an n-gram")

    def columns(self) -> frozenset[str]:
        """The captions."""
        return frozenset({"caption", "caption_index"})

    def partial(self, table: pl.DataFrame, states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """Name and 64 hashes of each caption: 150 bytes."""
        rows = table.select(*high_low(), pl.col("caption_index").fill_null(0), "caption").drop_nulls()
        found = signatures(rows["caption"].to_list(), self.words)
        dtype = pl.Array(pl.UInt16, NUM_HASHES)
        return rows.select(_CAPTION).with_columns(signature=pl.Series(found, dtype=dtype)).unique()

    def merge(self, partials: Sequence[pl.LazyFrame], states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The captions that are dropped.

        Memory: 60 bytes a caption, and 128 of each that has a signature of its own.
        """
        names, mark = _named(partials)
        order = np.lexsort((mark, *(names[name].to_numpy() for name in reversed(_CAPTION))))
        ordered = names[order]
        # not so for two samples of one uid, which have names in common
        order = order[ordered.select(pl.struct(_CAPTION).is_first_distinct()).to_series().to_numpy()]
        first = np.sort(np.unique(mark[order], return_index=True)[1])  # later rows of an equal signature never stay
        rows = _signatures_at(partials, order[first], len(mark))
        stays = np.zeros(len(order), bool)
        stays[first] = _stays(rows, self.min_similarity)
        return names[order[~stays]]

    def judge(self, table: pl.DataFrame, states: Sequence[pl.DataFrame], partials: Sequence[pl.DataFrame]) -> pl.Series:
        """True for captions that stay; null without a caption."""
        known = pl.col("caption").is_not_null()
        rows = table.select(*high_low(), pl.col("caption_index").fill_null(0), known=known)
        rows = rows.join(states[0].with_columns(gone=True), on=_CAPTION, how="left", maintain_order="left")
        return rows.select(keep=pl.when("known").then(pl.col("gone").is_null())).to_series()


def signatures(captions: Sequence[str], words: int) -> np.ndarray:
    """MinHash signatures.

    Args:
        captions: none null.
        words: of an n-gram.
    Returns:
        uint16 (n, 64): the low 16 bits of the least value that each of 64 hashes takes on a caption's n-grams.
    """
    if not captions:
        return np.empty((0, NUM_HASHES), np.uint16)
    grams, start = _grams(captions, words)
    found = np.empty((len(captions), NUM_HASHES), np.uint16)
    for number in range(NUM_HASHES):
        values = (mixed(grams, seed=number) >> np.uint64(32)).astype(np.uint32)
        found[:, number] = np.minimum.reduceat(values, start).astype(np.uint16)
    return found


def _grams(captions: Sequence[str], words: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of all n-grams, caption by caption, and where each caption's begin."""
    numbers: dict[str, int] = {}
    flat: list[int] = []
    lengths = np.empty(len(captions), np.int64)
    for row, caption in enumerate(captions):
        found = _WORD.findall(caption.casefold()) or [caption.strip()]
        lengths[row] = len(found)
        for word in found:
            number = numbers.get(word)
            if number is None:
                number = numbers[word] = int.from_bytes(
                    hashlib.blake2b(word.encode(), digest_size=8).digest(), "little"
                )
            flat.append(number)
    # each caption is followed by zeros, so that every word begins an n-gram and none runs into the next caption
    ends = np.cumsum(lengths)
    begins = ends - lengths
    padded = np.zeros(len(flat) + (words - 1) * len(captions), np.uint64)
    caption_of = np.repeat(np.arange(len(captions)), lengths)
    places = np.arange(len(flat)) + (words - 1) * caption_of
    padded[places] = np.array(flat, np.uint64)
    counts = np.maximum(lengths - words + 1, 1)
    chosen = places[np.arange(len(flat)) - begins[caption_of] < counts[caption_of]]
    grams = mixed(*(padded[chosen + ahead] for ahead in range(words)))
    return grams, np.cumsum(counts) - counts


def _named(partials: Sequence[pl.LazyFrame]) -> tuple[pl.DataFrame, np.ndarray]:
    """The names of all captions, and a number for each that is equal for equal signatures: uint64 (n,)."""
    names, marks = [], []
    for partial in partials:
        table = partial.collect()
        names.append(table.select(_CAPTION))
        marks.append(mixed(*_as_array(table["signature"]).view(np.uint64).T))
    return pl.concat(names), np.concatenate(marks)


def _signatures_at(partials: Sequence[pl.LazyFrame], wanted: np.ndarray, count: int) -> np.ndarray:
    """The signatures of some of all `count` captions.

    Args:
        partials: gone through one by one.
        wanted: rows of the partials put together, in the order in which they are wanted.
        count: rows of the partials put together.
    Returns:
        uint16 (len(wanted), 64).
    """
    place = np.full(count, -1, np.int64)
    place[wanted] = np.arange(len(wanted))
    rows, start = np.empty((len(wanted), NUM_HASHES), np.uint16), 0
    for partial in partials:
        found = _as_array(partial.select("signature").collect().to_series())
        here = place[start : start + len(found)]
        rows[here[here >= 0]] = found[here >= 0]
        start += len(found)
    return rows


def _stays(rows: np.ndarray, min_similarity: float) -> np.ndarray:
    """Which of different signatures stay: uint16 (n, 64), in order of precedence -> bool (n,).

    Similar ones differ in at most d hashes, so of d + t bands of hashes they agree in at least t: no pair is missed. Of
    few rows t is 1; of many it is 2, for which fewer are compared that are not similar.
    """
    if not len(rows):
        return np.zeros(0, bool)
    needed = math.ceil(min_similarity * NUM_HASHES)

    def similar(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        passed = np.empty(len(one), bool)
        for start in range(0, len(one), _PAIRS_AT_ONCE):
            some = slice(start, start + _PAIRS_AT_ONCE)
            passed[some] = (rows[one[some]] == rows[other[some]]).sum(axis=1) >= needed
        return passed

    differing = NUM_HASHES - needed
    agreeing = 2 if len(rows) >= _MANY and differing <= _FEW else 1
    keys = keys_of(list(_bands(rows, min(differing + agreeing, NUM_HASHES))), agreeing)
    return stay_in_turn(len(rows), pairs_that_pass(keys, similar))


def _bands(rows: np.ndarray, count: int) -> np.ndarray:
    """uint32 (count, n): a number for each band of hashes of each row, equal where they are."""
    found = np.empty((count, len(rows)), np.uint32)
    for start in range(0, len(rows), _PAIRS_AT_ONCE):
        columns = np.ascontiguousarray(rows[start : start + _PAIRS_AT_ONCE].T)
        for band, some in enumerate(np.array_split(columns, count)):
            found[band, start : start + _PAIRS_AT_ONCE] = mixed(*some) >> np.uint64(32)
    return found


def _as_array(column: pl.Series) -> np.ndarray:
    return np.ascontiguousarray(column.to_numpy().reshape(len(column), NUM_HASHES), np.uint16)
