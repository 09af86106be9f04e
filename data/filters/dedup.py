"""Duplicates by what is equal: one uid, or the same bytes.

Of equal bytes the sample with the smallest uid stays. uids are hashes, so "smallest" is an arbitrary choice, but the
same one whatever the order of the shards.
"""

from collections.abc import Sequence
from typing import ClassVar

import polars as pl

from mmfoundry.data.filters.base import FILTERS, PoolFilter
from mmfoundry.data.uids import high_low

_NUMBERS_AND_PLACE = ("high", "low", "shard", "index")
_AT_ONCE = 8  # tables that are read together
_MANY = 1 << 22  # marks, for which it pays to have several threads sort them
_ROWS_A_TURN = 1 << 26  # of which marks are held in memory at once, 8 bytes each


@FILTERS.register("exact_duplicate")
class ExactDuplicate(PoolFilter):
    """Of samples whose images have the same bytes, the one with the smallest uid stays."""

    def columns(self) -> frozenset[str]:
        """SHA-256 of the image's bytes."""
        return frozenset({"sha256"})

    def partial(self, table: pl.DataFrame, states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The hash and uid of each sample."""
        return table.select(*high_low(), "sha256").drop_nulls().unique()

    def merge(self, partials: Sequence[pl.LazyFrame], states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The smallest uid of each hash that several have."""
        return repeated(partials, ["sha256"]).sort("high", "low").unique("sha256", keep="first").sort("high", "low")

    def judge(self, table: pl.DataFrame, states: Sequence[pl.DataFrame], partials: Sequence[pl.DataFrame]) -> pl.Series:
        """True for the smallest uid of a hash; null where there is no hash."""
        first = states[0].rename({"high": "first_high", "low": "first_low"})
        rows = table.select(*high_low(), "sha256").join(first, on="sha256", how="left", maintain_order="left")
        is_first = (pl.col("first_high") == pl.col("high")) & (pl.col("first_low") == pl.col("low"))
        known = pl.when(pl.col("sha256").is_not_null())
        return rows.select(keep=known.then(is_first.fill_null(True))).to_series()


@FILTERS.register("unique_uid")
class UniqueUid(PoolFilter):
    """Of samples with one uid, the first in the pool stays: a uid names one sample.

    Its state has each repeated uid, the place of its first sample, and how many `samples` have it.
    """

    needs_uid: ClassVar[bool] = False

    def columns(self) -> frozenset[str]:
        """The uid as numbers, and the place in the pool."""
        return frozenset(_NUMBERS_AND_PLACE)

    def partial(self, table: pl.DataFrame, states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """uid and place of each sample, as numbers."""
        rows = table.select(_NUMBERS_AND_PLACE)
        index = table["index"].to_numpy()
        if (index[1:] == index[:-1]).any():  # several captions a sample
            rows = rows.unique(("shard", "index"), keep="first", maintain_order=True)
        return rows

    def merge(self, partials: Sequence[pl.LazyFrame], states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The first place of each uid that several samples have."""
        return (
            repeated(partials, ["high", "low"])
            .group_by("high", "low")
            .agg(place=_place().min(), samples=pl.len())
            .sort("high", "low")
        )

    def foregone(self, states: Sequence[pl.DataFrame]) -> bool | None:
        """True where no uid comes twice."""
        return None if states[0].height else True

    def judge(self, table: pl.DataFrame, states: Sequence[pl.DataFrame], partials: Sequence[pl.DataFrame]) -> pl.Series:
        """True for the rows of the first sample of each uid."""
        rows = table.select("high", "low", here=_place())
        rows = rows.join(states[0], on=["high", "low"], how="left", maintain_order="left")
        return rows.select(keep=(pl.col("place") == pl.col("here")).fill_null(True)).to_series()


def repeated(partials: Sequence[pl.LazyFrame], key: Sequence[str]) -> pl.DataFrame:
    """All rows of tables whose key comes more than once among them.

    Memory goes with the rows that are found, beside 8 bytes for each of at most 67 million rows.

    Args:
        partials: tables with the columns of the key and others, each gone through at most twice a turn.
        key: columns that must be equal.
    """
    partials = [pl.concat(partials[first : first + _AT_ONCE]) for first in range(0, len(partials), _AT_ONCE)]
    total = pl.concat([partial.select(pl.len()) for partial in partials]).sum().collect().item()
    turns = max(1, -(-total // _ROWS_A_TURN))
    found = []
    for turn in range(turns):
        marks = [_marks(partial.select(key).collect(), turn, turns) for partial in partials]
        together = pl.concat(marks)
        ordered = together.sort(multithreaded=len(together) > _MANY).to_numpy()
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if not len(twice):
            continue
        again = pl.Series(twice).unique().implode()
        for partial, mark in zip(partials, marks, strict=True):
            if mark.is_in(again).any():
                rows = partial.collect()
                found.append(rows.filter(rows.select(key).hash_rows().is_in(again)))
    if not found:
        return partials[0].head(0).collect()
    return pl.concat(found).filter(pl.len().over(key) > 1)  # different keys may have one mark


def _marks(keys: pl.DataFrame, turn: int, turns: int) -> pl.Series:
    """A number for each row, equal for equal rows, of this turn's rows."""
    marks = keys.hash_rows()
    return marks.filter(marks % turns == turn) if turns > 1 else marks


def _place() -> pl.Expr:
    """Where a sample is in the pool, as one number in the pool's order."""
    return pl.col("shard").cast(pl.UInt64) * 2**32 + pl.col("index")
