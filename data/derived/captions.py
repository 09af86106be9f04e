"""How long a caption is."""

from collections.abc import Mapping
from typing import ClassVar

import polars as pl

from mmfoundry.data.column import Column
from mmfoundry.data.derived.base import DERIVATIONS, Derivation

# a word of Python's `str.split`: its white space is that of regular expressions and \x1c to \x1f
WORD = r"[^\s\x1c-\x1f]+"
# a word of fastText: it splits at these characters alone
_TOKEN = r"[^ \n\r\t\x0b\x0c\x00]+"


@DERIVATIONS.register("caption_length")
class CaptionLength(Derivation):
    """Words, as Python's `str.split` counts them, and Unicode code points."""

    makes: ClassVar[Mapping[str, Column]] = {
        "caption_words": Column(pl.UInt32(), "table", "words of the caption, split at white space"),
        "caption_characters": Column(pl.UInt32(), "table", "characters of the caption (Unicode code points)"),
    }
    reads = frozenset({"caption"})

    @staticmethod
    def compute(table: pl.DataFrame) -> dict[str, pl.Series]:
        """Both counts; null without a caption."""
        captions = table["caption"]
        return {
            "caption_words": captions.str.count_matches(WORD).cast(pl.UInt32),
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
    def compute(table: pl.DataFrame) -> dict[str, pl.Series]:
        """The count; null without a caption."""
        captions = table["caption"]
        tokens = captions.str.count_matches(_TOKEN) + captions.str.count_matches("\n", literal=True)
        return {"caption_tokens": tokens.cast(pl.UInt32)}
