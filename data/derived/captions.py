"""How long a caption is."""

import polars as pl

from mmfoundry.data.column import Column
from mmfoundry.data.derived.base import DERIVATIONS, Derivation


@DERIVATIONS.register("caption_length")
class CaptionLength(Derivation):
    """Words, as Python's `str.split` counts them, and Unicode code points."""

    makes = {
        "caption_words": Column(pl.UInt32(), "table", "words of the caption, split at white space"),
        "caption_characters": Column(pl.UInt32(), "table", "characters of the caption (Unicode code points)"),
    }
    reads = frozenset({"caption"})

    @staticmethod
    def compute(table: pl.DataFrame) -> dict[str, pl.Series]:
        """Both counts; null without a caption."""
        captions = table["caption"]
        # Python's white space, which is not a regular expression's: \x1c to \x1f are in the first only
        words = [None if caption is None else len(caption.split()) for caption in captions]
        return {
            "caption_words": pl.Series(words, dtype=pl.UInt32),
            "caption_characters": captions.str.len_chars().cast(pl.UInt32),
        }
