"""`clip_score`: does the caption fit the image, by a CLIP that somebody trained."""

from typing import Literal

import polars as pl
from pydantic import Field, field_validator, model_validator

from mmfoundry.data.columns import COLUMNS, JSON_PREFIX
from mmfoundry.data.filters.base import FILTERS, Filter
from mmfoundry.pipeline.errors import UnknownColumn
from mmfoundry.pipeline.registry import unknown


@FILTERS.register("clip_score")
class ClipScore(Filter):
    """The cosine of image and caption under a CLIP is at least a threshold, or among the highest.

    DataComp (Gadre et al. 2023, arXiv 2304.14108, `clip_score` baselines): a top fraction f of n rows is the rows whose
    score is at least the one at place int(n f), counted from 0, of all scores sorted from the highest; ties are kept.
    Fraction 1 keeps all. In a sequence, n counts the rows that earlier filters kept: to take the fraction of the whole
    pool, put this filter first.
    """

    min: float | None = Field(None, ge=-1, le=1, description="cosine, inclusive; DataComp: 0.28 (B/32), 0.243 (L/14)")
    top: float | None = Field(None, gt=0, le=1, description="fraction of the pairs to keep; DataComp: 0.3")
    column: str = Field("clip_score", description="where the scores are: the scorer's, or a field `json.NAME`")

    @field_validator("column")
    @classmethod
    def _known(cls, column: str) -> str:
        if column not in COLUMNS and not column.startswith(JSON_PREFIX):
            raise UnknownColumn(unknown("column", column, list(COLUMNS)))
        return column

    @model_validator(mode="after")
    def _one_rule(self) -> "ClipScore":
        if (self.min is None) == (self.top is None):
            raise ValueError("give either min or top")
        return self

    @property
    def scope(self) -> Literal["row", "pool"]:
        """A threshold judges rows by themselves, a fraction all together."""
        return "row" if self.top is None else "pool"

    def columns(self) -> frozenset[str]:
        """The scores."""
        return frozenset({self.column})

    def keep(self, table: pl.DataFrame) -> pl.Series:
        """True from the threshold up; null where there is no score."""
        score = table[self.column].cast(pl.Float64, strict=False).fill_nan(None)
        threshold = self.min if self.top is None else _threshold(score, self.top)
        return (score >= threshold).alias("keep")


def _threshold(score: pl.Series, fraction: float) -> float:
    """The score at place int(n * fraction) of the n sorted from the highest; rows without a score count as lowest."""
    place = int(len(score) * fraction)
    ordered = score.drop_nulls().sort(descending=True)
    return float(ordered[place]) if place < len(ordered) else float("-inf")
