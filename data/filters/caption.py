"""`caption`: the rules that DataComp's image-based baseline has for captions, which are not those of `basic`."""

import polars as pl
from pydantic import Field

from mmfoundry.data.filters.base import FILTERS, Filter
from mmfoundry.data.filters.basic import CaptionCharacters, Language


@FILTERS.register("caption_tokens")
class CaptionTokens(Filter):
    """The caption has enough tokens, as fastText splits it; a newline is one as well."""

    min_tokens: int = Field(2, ge=0, description="tokens, inclusive; DataComp: more than 1")

    def expression(self) -> pl.Expr:
        """Number of tokens at least `min_tokens`."""
        return pl.col("caption_tokens") >= self.min_tokens


@FILTERS.register("caption")
class Caption(Filter):
    """DataComp's caption rules for image-based filtering: English, more than one token, more than five characters.

    Gadre et al. 2023 (arXiv 2304.14108), "a low-level text filter for the image based baseline" in its code: tokens are
    fastText's, split at spaces, tabs, line ends and NUL bytes, where `basic` asks for more than two words of Python's
    `str.split`.
    """

    languages: list[str] = Field(["en"], min_length=1, description="codes as fastText's lid.176 gives them")
    min_tokens: int = Field(2, ge=0, description="tokens of the caption, inclusive; DataComp: more than 1")
    min_characters: int = Field(6, ge=0, description="characters of the caption, inclusive; DataComp: more than 5")

    def expression(self) -> pl.Expr:
        """All three rules."""
        return pl.all_horizontal(part.expression() for _, part in self.parts())

    def parts(self) -> tuple[tuple[str, Filter], ...]:
        """The three rules by name, the cheap ones first."""
        return (
            ("caption.caption_tokens", CaptionTokens(min_tokens=self.min_tokens)),
            ("caption.caption_characters", CaptionCharacters(min_characters=self.min_characters)),
            ("caption.language", Language(languages=self.languages)),
        )
