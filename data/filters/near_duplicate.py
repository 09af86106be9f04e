"""`near_duplicate`: pictures that look the same, by their perceptual hashes."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from pydantic import Field

from mmfoundry.data.filters.base import FILTERS, PoolFilter
from mmfoundry.data.hamming import leaders
from mmfoundry.data.uids import high_low


@FILTERS.register("near_duplicate")
class NearDuplicate(PoolFilter):
    """Of samples whose pictures look the same (perceptual hashes differ in few bits), the smallest uid stays.

    Samples are taken in the order of their uid; one is dropped if an earlier sample that stays is within `radius`. So
    a chain of pictures that change step by step is thinned, not reduced to its first.
    """

    radius: int = Field(
        28, ge=0, le=200, description="bits of 512 in which two hashes may differ and be called the same"
    )

    def columns(self) -> frozenset[str]:
        """The perceptual hash."""
        return frozenset({"perceptual_hash"})

    def partial(self, table: pl.DataFrame, states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """Hash and uid of each sample."""
        return table.select(*high_low(), "perceptual_hash").drop_nulls().unique()

    def merge(self, partials: Sequence[pl.LazyFrame], states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The uids that are dropped."""
        high, low, hashes = _gathered(partials)
        order = np.lexsort((*hashes.T[::-1], low, high)) if _has_repeats(high, low) else np.lexsort((low, high))
        first = np.ones(len(order), bool)  # of samples with one uid but different pictures the smallest hash counts
        first[1:] = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
        order = order[first]
        dropped = order[~leaders(hashes[order], self.radius)]
        return pl.DataFrame({"high": high[dropped], "low": low[dropped]})

    def judge(self, table: pl.DataFrame, states: Sequence[pl.DataFrame], partials: Sequence[pl.DataFrame]) -> pl.Series:
        """True for samples that stay; null where there is no hash."""
        return not_among(table, states[0], known=pl.col("perceptual_hash").is_not_null())


def not_among(table: pl.DataFrame, dropped: pl.DataFrame, known: pl.Expr) -> pl.Series:
    """Whether a row's uid is not among those dropped; null where it is not known.

    Args:
        table: with "uid" and what `known` reads.
        dropped: "high" and "low" of uids.
        known: whether the row could be judged.
    """
    rows = table.select(*high_low(), known=known)
    gone = dropped.select("high", "low").unique().with_columns(gone=True)
    rows = rows.join(gone, on=["high", "low"], how="left", maintain_order="left")
    return rows.select(keep=pl.when("known").then(pl.col("gone").is_null())).to_series()


def _gathered(partials: Sequence[pl.LazyFrame]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uids as two arrays of numbers, and hashes as uint8 (n, bytes): 80 bytes a sample."""
    high, low, hashes = [], [], []
    for partial in partials:
        table = partial.collect()
        if table.height:
            high.append(table["high"].to_numpy())
            low.append(table["low"].to_numpy())
            values = table["perceptual_hash"].to_list()
            hashes.append(np.frombuffer(b"".join(values), np.uint8).reshape(len(values), -1))
    if not hashes:
        return np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty((0, 1), np.uint8)
    return np.concatenate(high), np.concatenate(low), np.concatenate(hashes)


def _has_repeats(high: np.ndarray, low: np.ndarray) -> bool:
    return pl.DataFrame({"high": high, "low": low}).is_duplicated().any()
