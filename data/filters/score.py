"""`clip_score`: does the caption fit the image, by a CLIP that somebody trained."""

from collections.abc import Sequence

import polars as pl
from pydantic import Field, field_validator, model_validator

from mmfoundry.data.filters.base import FILTERS
from mmfoundry.data.filters.parameters import numeric_column
from mmfoundry.data.filters.top import Highest


@FILTERS.register("clip_score")
class ClipScore(Highest):
    """The cosine of image and caption under a CLIP is at least a threshold, or among the highest.

    DataComp (Gadre et al. 2023, arXiv 2304.14108, `clip_score` baselines): "retain the top k=0.3 fraction of the pool
    by L/14 CLIP score", "retain all examples with B/32 CLIP score above 0.25". In its code "above" takes equal scores
    in; a top fraction f of n rows is the rows whose score is at least the one at place int(n f), counted from 0, of all
    scores sorted from the highest, where rows without a score come last. In a sequence, n counts the rows that earlier
    filters kept: to take the fraction of the whole pool, put this filter first.
    """

    min: float | None = Field(None, ge=-1, le=1, description="cosine, inclusive; DataComp: 0.25 (B/32), 0.243 (L/14)")
    top: float | None = Field(None, gt=0, le=1, description="fraction of the pairs to keep; DataComp: 0.3")
    model: str | None = Field(None, description="a scorer's name, for clip_MODEL_similarity_score; DataComp: l14")
    column: str | None = Field(None, description="where the scores are, if not with a scorer: a column or `json.NAME`")

    @field_validator("column")
    @classmethod
    def _known(cls, column: str | None) -> str | None:
        return None if column is None else numeric_column(column)

    @model_validator(mode="after")
    def _one_rule(self) -> "ClipScore":
        if (self.min is None) == (self.top is None):
            raise ValueError("give either min or top")
        if (self.model is None) == (self.column is None):
            raise ValueError("give either model, a scorer's name, or column")
        numeric_column(self._column)
        return self

    @property
    def _column(self) -> str:
        return self.column or f"clip_{self.model}_similarity_score"

    @property
    def num_rounds(self) -> int:  # type: ignore[override]
        """A threshold needs none."""
        return 0 if self.top is None else 2

    def columns(self) -> frozenset[str]:
        """The scores."""
        return frozenset({self._column})

    def value(self) -> pl.Expr:
        """The score."""
        return pl.col(self._column).cast(pl.Float64, strict=False)

    def place(self, num_rows: int, num_values: int) -> int:
        """DataComp's."""
        assert self.top is not None  # a threshold has no place
        return int(num_rows * self.top)

    def judge(self, table: pl.DataFrame, states: Sequence[pl.DataFrame], partials: Sequence[pl.DataFrame]) -> pl.Series:
        """True from the threshold up; null where there is no score."""
        if self.top is not None:
            return super().judge(table, states, partials)
        scores = table[self._column]
        # as in numpy: a single-precision score is held against the threshold in single precision
        kind = pl.Float32 if scores.dtype == pl.Float32 else pl.Float64
        scores = scores.cast(kind, strict=False).fill_nan(None)
        return (scores >= pl.Series([self.min], dtype=kind)).alias("keep")
