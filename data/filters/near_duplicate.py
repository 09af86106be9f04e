"""`near_duplicate`: pictures that look the same, by their perceptual hashes."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from pydantic import Field

from mmfoundry.data.crew import Crew
from mmfoundry.data.filters.base import FILTERS, SharedMerge
from mmfoundry.data.hamming import Nearness, words_of
from mmfoundry.data.near_rows import CodedRows
from mmfoundry.data.uids import high_low


@FILTERS.register("near_duplicate")
class NearDuplicate(SharedMerge):
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

    def merge_with(self, crew: Crew, partials: Sequence[pl.LazyFrame], states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The uids that are dropped.

        Memory: 50 bytes a sample in this process, 16 of each with a hash of its own in every worker, and 130 of each of
        these in files that all of them map.
        """
        rows = CodedRows(partials, "perceptual_hash", _words)
        names, marks = rows.named(("high", "low"))
        order = np.lexsort((names["low"].to_numpy(), names["high"].to_numpy()))
        order = order[~np.isin(order, _second_hashes(names, partials))]
        stays = rows.leaders(order, marks, Nearness(self.radius, _num_bits(partials)), crew)
        return names[order[~stays]]

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


def _second_hashes(names: pl.DataFrame, partials: Sequence[pl.LazyFrame]) -> np.ndarray:
    """Of rows with one uid but different pictures, all but the one with the smallest hash."""
    repeated = names.select(pl.struct("high", "low").is_duplicated()).to_series()
    if not repeated.any():
        return np.empty(0, np.int64)
    hashes = pl.concat([partial.select("perceptual_hash") for partial in partials]).with_row_index("row")
    found = names.with_row_index("row").filter(repeated).lazy().join(hashes, on="row").sort("perceptual_hash").collect()
    return found.filter(~pl.struct("high", "low").is_first_distinct())["row"].to_numpy()


def _words(hashes: pl.Series) -> np.ndarray:
    """uint64 (n, words)."""
    values = hashes.to_list()
    return words_of(np.frombuffer(b"".join(values), np.uint8).reshape(len(values), -1 if values else 0))


def _num_bits(partials: Sequence[pl.LazyFrame]) -> int:
    """Of a hash; 1 where there is none."""
    for partial in partials:
        first = partial.select("perceptual_hash").head(1).collect()
        if first.height:
            return 8 * len(first.item())
    return 1
