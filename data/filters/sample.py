"""`sample` and `cap_per_cluster`: fewer samples, drawn by their uids, so that the pool's order does not matter.

A sample's draw is a number made from its uid and a seed; the lowest draws stay. So a smaller sample is part of a larger
one of the same seed.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import polars as pl
from pydantic import Field, field_validator, model_validator

from mmfoundry.data.clusters import KMeans, assign, matrix_of
from mmfoundry.data.filters.base import FILTERS, PoolFilter
from mmfoundry.data.filters.parameters import EMBEDDING, type_of
from mmfoundry.data.uids import high_low, mixed


@FILTERS.register("sample")
class Drawn(PoolFilter):
    """Some samples stay, drawn by their uids: each with a probability, or a number of them."""

    fraction: float | None = Field(None, ge=0, le=1, description="probability of each sample to stay")
    count: int | None = Field(None, ge=1, description="samples that stay")
    seed: int = Field(0, ge=0, description="of the draw")

    @model_validator(mode="after")
    def _one_rule(self) -> "Drawn":
        if (self.fraction is None) == (self.count is None):
            raise ValueError("give either fraction or count")
        return self

    @property
    def num_rounds(self) -> int:  # type: ignore[override]
        """A probability needs none."""
        return 0 if self.count is None else 1

    def columns(self) -> frozenset[str]:
        """Nothing but the uid."""
        return frozenset({"uid"})

    def partial(self, table: pl.DataFrame, states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The lowest draws of the part, as many as may stay in all."""
        assert self.count is not None  # otherwise there are no rounds
        return pl.DataFrame({"draw": np.unique(draws_of(table["uid"], self.seed))[: self.count]})

    def merge(self, partials: Sequence[pl.LazyFrame], states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The highest draw that stays; no row for an empty pool."""
        assert self.count is not None
        lowest = pl.concat(partials).unique().bottom_k(self.count, by="draw").collect(engine="streaming")
        return lowest.select(pl.col("draw").max()).drop_nulls()

    def judge(self, table: pl.DataFrame, states: Sequence[pl.DataFrame], partials: Sequence[pl.DataFrame]) -> pl.Series:
        """True for the samples that are drawn."""
        draws = draws_of(table["uid"], self.seed)
        if self.fraction is not None:
            return pl.Series("keep", (draws >> np.uint64(11)) < self.fraction * 2.0**53, dtype=pl.Boolean)
        return pl.Series("keep", draws <= states[0]["draw"].max(), dtype=pl.Boolean) if len(draws) else _none()


@FILTERS.register("cap_per_cluster")
class CapPerCluster(PoolFilter):
    """Of each cluster at most so many samples stay, drawn by their uids: what is common does not drown the rest.

    Rows with one value in a column (`language`, `json.NAME`) are a cluster. A column of embeddings makes clusters by
    k-means on the rows that reach the filter.
    """

    dear: ClassVar[bool] = True

    column: str = Field(description="what makes clusters: any column; embeddings are SCORER_img and SCORER_txt")
    count: int = Field(ge=1, description="samples of each cluster that stay, at most")
    num_clusters: int = Field(1000, ge=1, description="clusters of embeddings; not read for other columns")
    iterations: int = Field(20, ge=1, description="of k-means; not read for other columns")
    max_points: int = Field(1_000_000, ge=1, description="samples to train k-means on; not read for other columns")
    seed: int = Field(0, ge=0, description="of the draws and of k-means")

    @field_validator("column")
    @classmethod
    def _known(cls, column: str) -> str:
        dtype = type_of(column)
        if dtype.is_nested() and dtype != EMBEDDING:
            raise ValueError(f"{column} is a {dtype} and makes no clusters")
        return column

    @property
    def num_rounds(self) -> int:  # type: ignore[override]
        """One, after those of the training."""
        return 1 + self._training_rounds()

    def _training_rounds(self) -> int:
        return KMeans.num_rounds if type_of(self.column) == EMBEDDING else 0

    def _training(self) -> KMeans:
        return KMeans(self.column, self.num_clusters, self.iterations, self.max_points, self.seed)

    def columns(self) -> frozenset[str]:
        """What tells the clusters apart."""
        return frozenset({self.column})

    def partial(self, table: pl.DataFrame, states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """What the training must know; then the lowest draws of each cluster in the part, as many as may stay."""
        if len(states) < self._training_rounds():
            return self._training().partial(table, states)
        return _lowest(self._drawn(table, states).lazy(), self.count).collect()

    def merge(self, partials: Sequence[pl.LazyFrame], states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """What the training comes to; then the highest draw that stays, for each cluster that has enough samples."""
        if len(states) < self._training_rounds():
            return self._training().merge(partials, states)
        lowest = _lowest(pl.concat(partials), self.count)
        highest = lowest.group_by("cluster").agg(pl.col("draw").max(), count=pl.len())
        return highest.filter(pl.col("count") == self.count).drop("count").sort("cluster").collect(engine="streaming")

    def judge(self, table: pl.DataFrame, states: Sequence[pl.DataFrame], partials: Sequence[pl.DataFrame]) -> pl.Series:
        """True for the samples that are drawn, and for all of a cluster that has no more than may stay."""
        highest = states[-1].rename({"draw": "highest"})
        drawn = self._drawn(table, states).join(highest, on="cluster", how="left", maintain_order="left")
        stays = (pl.col("draw") <= pl.col("highest")).fill_null(True)
        return drawn.select(keep=pl.when(pl.col("cluster").is_not_null()).then(stays))["keep"]

    def _drawn(self, table: pl.DataFrame, states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        draws = pl.Series("draw", draws_of(table["uid"], self.seed), dtype=pl.UInt64)
        cluster = table[self.column].alias("cluster")
        if self._training_rounds():
            cluster = assign(cluster, matrix_of(states[1]["centroid"])).alias("cluster")
        return pl.DataFrame([cluster.fill_nan(None) if cluster.dtype.is_float() else cluster, draws])


def draws_of(uids: pl.Series, seed: int) -> np.ndarray:
    """One number a row, uint64, uniform; equal uids draw the same."""
    high, low = uids.alias("uid").to_frame().select(*high_low()).get_columns()
    return mixed(high.to_numpy(), low.to_numpy(), seed=seed)


def _lowest(drawn: pl.LazyFrame, count: int) -> pl.LazyFrame:
    """The `count` lowest draws of each cluster; a sample with several rows in a cluster draws once."""
    distinct = drawn.drop_nulls().unique()
    return distinct.filter(pl.col("draw").rank("ordinal").over("cluster") <= count)


def _none() -> pl.Series:
    return pl.Series("keep", [], dtype=pl.Boolean)
