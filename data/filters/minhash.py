"""`caption_near_duplicate`: captions made of nearly the same words, by MinHash."""

import hashlib
import math
import re
from collections.abc import Sequence

import numpy as np
import polars as pl
from pydantic import Field

from mmfoundry.data.crew import Crew
from mmfoundry.data.filters.base import FILTERS, SharedMerge
from mmfoundry.data.hamming import Nearness
from mmfoundry.data.near_rows import CodedRows
from mmfoundry.data.uids import high_low, mixed

NUM_HASHES = 64
_WORD = re.compile(r"\w+")
_CAPTION = ("high", "low", "caption_index")


@FILTERS.register("caption_near_duplicate")
class CaptionNearDuplicate(SharedMerge):
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

    def merge_with(self, crew: Crew, partials: Sequence[pl.LazyFrame], states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The captions that are dropped.

        Memory: 60 bytes a caption in this process, 16 of each with a signature of its own in every worker, and 190 of
        each of these in files that all of them map.
        """
        rows = CodedRows(partials, "signature", _words)
        names, marks = rows.named(_CAPTION)
        order = np.lexsort((marks, *(names[name].to_numpy() for name in reversed(_CAPTION))))
        # not so for two samples of one uid, which have names in common
        order = order[names[order].select(pl.struct(_CAPTION).is_first_distinct()).to_series().to_numpy()]
        differing = NUM_HASHES - math.ceil(self.min_similarity * NUM_HASHES)
        stays = rows.leaders(order, marks, Nearness(differing, NUM_HASHES, place_bits=16), crew)
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


def _words(signatures: pl.Series) -> np.ndarray:
    """Signatures, four hashes a word: uint64 (n, 16)."""
    return np.ascontiguousarray(signatures.to_numpy().reshape(-1, NUM_HASHES), np.uint16).view(np.uint64)
