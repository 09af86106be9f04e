"""`top`: the rows with the highest values of a column, by an exact threshold that is found in two rounds.

The first round counts values by their leading bits, the second counts the values that share the bits of the one at the
wanted place. What the parts of a pool tell each other is a few thousand rows, however large the pool is.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import polars as pl
from pydantic import Field, field_validator, model_validator

from mmfoundry.data.filters.base import FILTERS, PoolFilter
from mmfoundry.data.filters.parameters import numeric_column

_LEADING = 22  # bits: sign, exponent and ten of the fraction of a float64
_AT_ONCE = 1 << 14  # values, which stay in the cache


class Highest(PoolFilter):
    """Rows are sorted from the highest value, and stay down to the value at some place; ties stay.

    Rows without a value (null, NaN) come last. DataComp's rule (Gadre et al. 2023, arXiv 2304.14108, `clip_score`
    baselines) for a fraction f of n rows takes the place int(n f), counted from 0; where the row at that place has no
    value, nothing is kept, since no value is at least NaN. A place past the last row, which is f = 1, is an index
    error there; here it keeps every row that has a value.
    """

    num_rounds: ClassVar[int] = 2
    needs_uid: ClassVar[bool] = False

    def value(self) -> pl.Expr:
        """What is sorted, as Float64; null or NaN where a row has none."""
        raise NotImplementedError

    def place(self, num_rows: int, num_values: int) -> int:
        """The place, counted from 0, of the lowest value that stays; past the rows for all."""
        raise NotImplementedError

    def values(self, table: pl.DataFrame) -> pl.Series:
        """What is sorted; null where a row has none."""
        # adding zero makes one of the two zeros
        return table.select(value=self.value().fill_nan(None) + 0.0)["value"]

    def partial(self, table: pl.DataFrame, states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """How many values have which leading bits; then how often each value comes among those that matter."""
        values = self.values(table)
        leading = _leading_bits(values)
        if not states:
            return _counted("leading", leading)
        wanted = states[0]["leading"]  # one row, perhaps null
        return _counted("value", values.filter(leading == wanted))

    def merge(self, partials: Sequence[pl.LazyFrame], states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The leading bits of the value at the place, and the place among the values that have them; then the value."""
        name = "value" if states else "leading"
        counts = pl.concat(partials).group_by(name).agg(pl.col("count").sum()).collect(engine="streaming")
        present = counts.drop_nulls(name).sort(name, descending=True)
        if states:
            place, otherwise = states[0].select("place", "otherwise").row(0)
            found = otherwise if place is None else present["value"][_at(present["count"], place)[0]]
            return pl.DataFrame({"threshold": [found]}, schema={"threshold": pl.Float64})
        num_rows, num_values = int(counts["count"].sum()), int(present["count"].sum())
        place = self.place(num_rows, num_values)
        found = {"leading": None, "place": None, "otherwise": float("-inf") if place >= num_rows else float("nan")}
        if place < num_values:
            row, before = _at(present["count"], place)
            found |= {"leading": present["leading"][row], "place": place - before}
        schema = {"leading": pl.UInt32, "place": pl.UInt64, "otherwise": pl.Float64}
        return pl.DataFrame([found], schema=schema)

    def judge(self, table: pl.DataFrame, states: Sequence[pl.DataFrame], partials: Sequence[pl.DataFrame]) -> pl.Series:
        """True from the threshold up; null where there is no value."""
        threshold = float(states[1]["threshold"][0])
        # no value is at least NaN, for polars every one that is not null is below it
        return (self.values(table) >= threshold).alias("keep")


@FILTERS.register("top")
class Top(Highest):
    """The highest (or lowest) values of a column stay: a fraction of the rows, by DataComp's rule, or a number."""

    column: str = Field(description="numbers: a column, or a field `json.NAME`")
    fraction: float | None = Field(None, gt=0, le=1, description="of the rows; down to the one at place int(n f)")
    count: int | None = Field(None, ge=1, description="rows; ties with the last one stay as well")
    lowest: bool = Field(False, description="the lowest values stay, not the highest")

    @field_validator("column")
    @classmethod
    def _known(cls, column: str) -> str:
        return numeric_column(column)

    @model_validator(mode="after")
    def _one_rule(self) -> "Top":
        if (self.fraction is None) == (self.count is None):
            raise ValueError("give either fraction or count")
        return self

    def columns(self) -> frozenset[str]:
        """The values."""
        return frozenset({self.column})

    def value(self) -> pl.Expr:
        """The column, turned around for the lowest."""
        number = pl.col(self.column).cast(pl.Float64, strict=False)
        return -number if self.lowest else number

    def place(self, num_rows: int, num_values: int) -> int:
        """Of the fraction or the count; a count that is not reached keeps all."""
        if self.fraction is not None:
            return int(num_rows * self.fraction)
        assert self.count is not None  # the validator saw to it
        return self.count - 1 if self.count <= num_values else num_rows


def _leading_bits(values: pl.Series) -> pl.Series:
    """The first bits of each float, in an order that is that of the floats; null stays null."""
    floats = values.fill_null(0.0).to_numpy()
    found = np.empty(len(floats), np.uint32)
    for start in range(0, len(floats), _AT_ONCE):
        bits = floats[start : start + _AT_ONCE].view(np.uint64)
        ordered = np.where(bits >> np.uint64(63) == 1, ~bits, bits | np.uint64(1 << 63))
        found[start : start + _AT_ONCE] = ordered >> np.uint64(64 - _LEADING)
    leading = pl.Series("leading", found)
    return leading.set(values.is_null(), None) if values.null_count() else leading


def _counted(name: str, values: pl.Series) -> pl.DataFrame:
    return values.alias(name).value_counts(name="count").with_columns(pl.col("count").cast(pl.UInt64))


def _at(counts: pl.Series, place: int) -> tuple[int, int]:
    """The row that holds the element at a place of a list with these counts, and how many elements come before it."""
    ends: Any = counts.to_numpy().cumsum()
    row = int(np.searchsorted(ends, place, side="right"))
    return row, int(ends[row]) - int(counts[row])
