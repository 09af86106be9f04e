"""Filters on one pair's caption and image: DataComp's basic rules (Gadre et al. 2023, arXiv 2304.14108) and kin.

DataComp's `basic` keeps a pair if fastText's first guess for its text is English, the text has more than two words
(split at white space) and more than five characters, the shorter side of the image has at least 200 pixels, and the
longer side is at most three times the shorter one. Limits here are inclusive, so "more than two words" is
`min_words: 3`.
"""

import polars as pl
from pydantic import Field

from mmfoundry.data.filters.base import FILTERS, Filter


@FILTERS.register("language")
class Language(Filter):
    """The caption's language, by fastText's first guess, is one of those asked for."""

    languages: list[str] = Field(["en"], min_length=1, description="codes as fastText's lid.176 gives them")
    min_probability: float = Field(0.0, ge=0, le=1, description="of the first guess; DataComp asks for none")

    def expression(self) -> pl.Expr:
        """First guess and, only where it is asked for, its probability."""
        first = pl.col("language").is_in(self.languages)
        return first & (pl.col("language_probability") >= self.min_probability) if self.min_probability else first


@FILTERS.register("caption_words")
class CaptionWords(Filter):
    """The caption has enough words, split at white space."""

    min_words: int = Field(3, ge=0, description="words, inclusive; DataComp: more than 2")
    max_words: int | None = Field(None, ge=0, description="words, inclusive; null for no limit")

    def expression(self) -> pl.Expr:
        """Number of words within the limits."""
        return _between("caption_words", self.min_words, self.max_words)


@FILTERS.register("caption_characters")
class CaptionCharacters(Filter):
    """The caption has enough characters (Unicode code points)."""

    min_characters: int = Field(6, ge=0, description="characters, inclusive; DataComp: more than 5")
    max_characters: int | None = Field(None, ge=0, description="characters, inclusive; null for no limit")

    def expression(self) -> pl.Expr:
        """Number of characters within the limits."""
        return _between("caption_characters", self.min_characters, self.max_characters)


@FILTERS.register("min_side")
class MinSide(Filter):
    """The image's shorter side has enough pixels."""

    pixels: int = Field(200, ge=0, description="pixels, inclusive; DataComp: 200")

    def expression(self) -> pl.Expr:
        """Shorter side at least `pixels`; zero sizes cannot be judged."""
        return pl.when(_known_size()).then(pl.min_horizontal("width", "height") >= self.pixels)


@FILTERS.register("max_aspect")
class MaxAspect(Filter):
    """The image's longer side is not too many times its shorter one."""

    ratio: float = Field(3.0, ge=1, description="longer side / shorter side, inclusive; DataComp: 3")

    def expression(self) -> pl.Expr:
        """Longer over shorter side at most `ratio`; zero sizes cannot be judged."""
        longer, shorter = pl.max_horizontal("width", "height"), pl.min_horizontal("width", "height")
        return pl.when(_known_size()).then(longer / shorter <= self.ratio)


@FILTERS.register("basic")
class Basic(Filter):
    """DataComp's basic filter: language, words and characters of the caption, shorter side and aspect of the image."""

    languages: list[str] = Field(["en"], min_length=1, description="codes as fastText's lid.176 gives them")
    min_probability: float = Field(0.0, ge=0, le=1, description="of fastText's first guess; DataComp asks for none")
    min_words: int = Field(3, ge=0, description="words of the caption, inclusive; DataComp: more than 2")
    min_characters: int = Field(6, ge=0, description="characters of the caption, inclusive; DataComp: more than 5")
    min_side: int = Field(200, ge=0, description="pixels of the shorter side, inclusive; DataComp: 200")
    max_aspect: float = Field(3.0, ge=1, description="longer side / shorter side, inclusive; DataComp: 3")

    def expression(self) -> pl.Expr:
        """All five rules."""
        return pl.all_horizontal(part.expression() for _, part in self.parts())

    def parts(self) -> tuple[tuple[str, Filter], ...]:
        """The five rules by name, the cheap ones first."""
        return (
            ("basic.caption_words", CaptionWords(min_words=self.min_words)),
            ("basic.caption_characters", CaptionCharacters(min_characters=self.min_characters)),
            ("basic.min_side", MinSide(pixels=self.min_side)),
            ("basic.max_aspect", MaxAspect(ratio=self.max_aspect)),
            ("basic.language", Language(languages=self.languages, min_probability=self.min_probability)),
        )


@FILTERS.register("readable")
class Readable(Filter):
    """Image and text can be read: the image decodes to its last pixel and is within the decode limits."""

    def expression(self) -> pl.Expr:
        """No reason against it was found."""
        return pl.col("unreadable").is_null()


@FILTERS.register("not_blank")
class NotBlank(Filter):
    """The picture shows something: its pixels are not all about the same colour."""

    min_deviation: float = Field(
        2.0, ge=0, le=128, description="standard deviation of the pixels, largest over R, G, B; of 255; inclusive"
    )

    def expression(self) -> pl.Expr:
        """Deviation at least `min_deviation`."""
        return pl.col("pixel_deviation") >= self.min_deviation


def _between(column: str, low: int, high: int | None) -> pl.Expr:
    within = pl.col(column) >= low
    return within if high is None else within & (pl.col(column) <= high)


def _known_size() -> pl.Expr:
    return (pl.col("width") > 0) & (pl.col("height") > 0)
