"""How long a caption is."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import polars as pl

from mmfoundry.data.column import Column
from mmfoundry.data.derived.base import DERIVATIONS, PACKAGED, Derivation, Models

# a word of fastText: it splits at these characters alone
_TOKEN = r"[^ \n\r\t\x0b\x0c\x00]+"
_ROWS_AT_ONCE = 1 << 14  # whose text stays in the cache


@DERIVATIONS.register("caption_length")
class CaptionLength(Derivation):
    """Words, as Python's `str.split` counts them, and Unicode code points."""

    makes: ClassVar[Mapping[str, Column]] = {
        "caption_words": Column(pl.UInt32(), "table", "words of the caption, split at white space"),
        "caption_characters": Column(pl.UInt32(), "table", "characters of the caption (Unicode code points)"),
    }
    reads = frozenset({"caption"})

    @staticmethod
    def compute(table: pl.DataFrame, models: Models = PACKAGED) -> dict[str, pl.Series]:
        """Both counts; null without a caption."""
        captions = table["caption"]
        return {
            "caption_words": count_words(captions),
            "caption_characters": captions.str.len_chars().cast(pl.UInt32),
        }


@DERIVATIONS.register("caption_tokens")
class CaptionTokens(Derivation):
    """Tokens as fastText's `tokenize` counts them, which DataComp's image-based baseline asks for.

    They are the words between spaces, tabs, line ends and NUL bytes; no-break spaces and the like split nothing. Each
    newline is a token as well: the end of a sentence.
    """

    makes: ClassVar[Mapping[str, Column]] = {
        "caption_tokens": Column(pl.UInt32(), "table", "fastText's tokens of the caption; a newline is one as well"),
    }
    reads = frozenset({"caption"})

    @staticmethod
    def compute(table: pl.DataFrame, models: Models = PACKAGED) -> dict[str, pl.Series]:
        """The count; null without a caption."""
        captions = table["caption"]
        tokens = captions.str.count_matches(_TOKEN) + captions.str.count_matches("\n", literal=True)
        return {"caption_tokens": tokens.cast(pl.UInt32)}


def each_once(captions: pl.Series) -> tuple[pl.Series, pl.Series]:
    """The different captions, for what is dear to find out of one: many stand in a pool more than once.

    Returns:
        Each caption once, in any order; and for each row which of them it has, null for a null.
    """
    found = captions.alias("caption").to_frame().with_row_index("row").drop_nulls().group_by("caption").agg("row")
    which = np.zeros(len(captions), np.uint32)
    times = found["row"].list.len().to_numpy()
    which[found["row"].explode().to_numpy()] = np.repeat(np.arange(found.height, dtype=np.uint32), times)
    return found["caption"], pl.Series(which).set(captions.is_null(), None)


def count_words(captions: pl.Series) -> pl.Series:
    """Words of each caption, as `len(text.split())`; null without a caption."""
    starts = range(0, len(captions), _ROWS_AT_ONCE)
    counts = [_Words(captions[start : start + _ROWS_AT_ONCE]).counts() for start in starts]
    found = pl.Series(np.concatenate([np.zeros(0, np.uint32), *counts]))
    return found.set(captions.is_null(), None) if captions.null_count() else found


def words_of(captions: pl.Series) -> tuple[pl.Series, np.ndarray]:
    """All words of captions, as `text.split()`, one caption after the other.

    Returns:
        The words, and for each the row of its caption.
    """
    words, rows = [pl.Series([], dtype=pl.String)], [np.zeros(0, np.int64)]
    for start in range(0, len(captions), _ROWS_AT_ONCE):
        some = _Words(captions[start : start + _ROWS_AT_ONCE])
        words.append(some.words())
        counts = some.counts()
        rows.append(np.repeat(np.arange(start, start + len(counts)), counts))
    return pl.concat(words), np.concatenate(rows)


class _Words:
    """The bytes of many captions and the white space among them: several times as fast as a regular expression."""

    def __init__(self, captions: pl.Series) -> None:
        captions = captions.fill_null("") if captions.null_count() else captions
        # captions are parted by line ends, which are white space as well
        self._text = np.frombuffer(captions.str.join("\n").cast(pl.Binary).item(), np.uint8)
        self._starts = np.zeros(len(captions), np.int64)
        np.cumsum(captions.str.len_bytes().to_numpy()[:-1] + np.int64(1), out=self._starts[1:])
        # \t to \r, \x1c to \x1f and the blank
        self._space = ((self._text - np.uint8(9)) <= 4) | ((self._text - np.uint8(28)) <= 4)
        if len(self._text) and self._text.max() >= 0x80:
            _mark_wide_spaces(self._text, self._space)

    def counts(self) -> np.ndarray:
        """uint32, the words of each caption; 0 for a null."""
        first = np.zeros(len(self._text) + 1, bool)  # bytes of words; the last caption may have no byte of its own
        first[:-1] = ~self._space
        first[1:-1] &= self._space[:-1]
        return np.add.reduceat(first, self._starts, dtype=np.uint32)

    def words(self) -> pl.Series:
        """The words."""
        kept = ~self._space
        last = self._space[1:] & ~self._space[:-1]  # the first byte of white space after each word
        kept[1:] |= last
        text = self._text[kept]
        text[self._space[kept]] = ord(" ")
        words = pl.Series([text.tobytes()]).cast(pl.String).str.split(" ").explode()
        return words[: len(words) - 1] if words[-1] == "" else words


def _mark_wide_spaces(text: np.ndarray, space: np.ndarray) -> None:
    """Mark the bytes of white space beyond ASCII, in UTF-8."""
    places = np.flatnonzero(text == 0xC2)
    wide = places[np.isin(text[places + 1], (0x85, 0xA0))]  # U+0085, U+00A0
    space[wide] = space[wide + 1] = True
    # the first two bytes are looked at where they stand: in some languages every character begins with E3
    lead, second = text[:-1], text[1:]
    found = (lead == 0xE2) & ((second == 0x80) | (second == 0x81))
    found |= (lead == 0xE3) & (second == 0x80)
    found |= (lead == 0xE1) & (second == 0x9A)
    places = np.flatnonzero(found)
    lead, second, third = text[places], text[places + 1], text[places + 2]
    of_2000 = (third <= 0x8A) | (third == 0xA8) | (third == 0xA9) | (third == 0xAF)  # to U+200A, U+2028, 2029, 202F
    wide = places[
        ((lead == 0xE2) & (((second == 0x80) & of_2000) | ((second == 0x81) & (third == 0x9F))))  # U+205F
        | ((lead != 0xE2) & (third == 0x80))  # U+1680, U+3000
    ]
    space[wide] = space[wide + 1] = space[wide + 2] = True
