"""`laion2b`: how LAION-2B was chosen, as DataComp reproduces it."""

import polars as pl
from pydantic import Field

from mmfoundry.data.filters.base import FILTERS, Filter
from mmfoundry.data.filters.combine import All
from mmfoundry.data.filters.score import ClipScore


@FILTERS.register("cld3_language")
class Cld3Language(Filter):
    """The caption's language, by CLD3's guess, is one of those asked for."""

    languages: list[str] = Field(["en"], min_length=1, description="codes as CLD3 gives them, BCP-47")

    def expression(self) -> pl.Expr:
        """The guess is one of them."""
        return pl.col("cld3_language").is_in(self.languages)


@FILTERS.register("laion2b")
class Laion2b(Filter):
    """B/32's cosine of image and caption is at least 0.28, and the caption is English by CLD3.

    DataComp (Gadre et al. 2023, arXiv 2304.14108, `laion2b` baseline) "reproduces the filtering strategy used to create
    the LAION-2B dataset: applies a B/32 CLIP score filter on image-text pairs, retaining samples with score above 0.28,
    and an English filter using the gcld3 model to detect language" (Schuhmann et al. 2022, arXiv 2210.08402). In its
    code "above" takes equal scores in.
    """

    min: float = Field(0.28, ge=-1, le=1, description="cosine, inclusive")
    model: str = Field("b32", description="the scorer, whose column is clip_MODEL_similarity_score")
    languages: list[str] = Field(["en"], min_length=1, description="codes as CLD3 gives them")

    def columns(self) -> frozenset[str]:
        """Score and language."""
        return frozenset().union(*(part.columns() for _, part in self.parts()))

    def keep(self, table: pl.DataFrame) -> pl.Series:
        """One rule after the other."""
        return All(filters=tuple(part for _, part in self.parts())).keep(table)

    def parts(self) -> tuple[tuple[str, Filter], ...]:
        """The two rules by name, the cheap one first."""
        return (
            ("laion2b.clip_score", ClipScore(min=self.min, model=self.model)),
            ("laion2b.cld3_language", Cld3Language(languages=self.languages)),
        )
