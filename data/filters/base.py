"""What a filter is: typed parameters, the columns it reads, and a verdict on each row of the metadata table.

A row of the table is a pair: one image with one of its captions (a sample with three captions has three rows, one
without captions has one row whose caption is null). A verdict is True (keep), False (drop) or null (cannot be judged,
because a column is null there); what is null is not kept. A sample is kept while one of its pairs is, and goes on with
the captions of those pairs only. So a filter on captions cuts captions, a filter on images drops samples, and neither
needs to know which of the two it is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import polars as pl

from mmfoundry.data.crew import Crew, alone
from mmfoundry.pipeline.config import Config
from mmfoundry.pipeline.registry import Registry


class Filter(Config):
    """A pure function of the metadata table; its fields are the parameters that a recipe may set.

    A filter that judges each row by itself defines `expression` (or, if polars cannot say it, `columns` and `keep`).
    One that looks at rows together (duplicates, a top fraction) is a `PoolFilter`.
    """

    needs_uid: ClassVar[bool] = False
    dear: ClassVar[bool] = False  # whether its verdicts are worth keeping on a disk

    @property
    def scope(self) -> Literal["row", "pool"]:
        """Whether the verdict on a row depends on that row alone, so that a pool can be judged in parts."""
        return "row"

    def expression(self) -> pl.Expr:
        """The verdict as a polars expression over the columns."""
        raise NotImplementedError(f"{type(self).__name__} judges whole tables")

    def columns(self) -> frozenset[str]:
        """The columns that the filter reads; only those are computed."""
        return frozenset(self.expression().meta.root_names())

    def files(self) -> tuple[Path, ...]:
        """The files that the verdict depends on besides the columns: lists of words, clusters, sets to keep apart."""
        return ()

    def keep(self, table: pl.DataFrame) -> pl.Series:
        """The verdict on each row, in the order of the table.

        Args:
            table: at least `columns()` and, for a filter that `needs_uid`, "uid", which tells the rows of one sample.
        Returns:
            Boolean series of the table's height; null where a row cannot be judged.
        """
        return table.with_columns(__keep=self.expression().cast(pl.Boolean))["__keep"].alias("keep")

    def parts(self) -> tuple[tuple[str, "Filter"], ...]:
        """Steps that are applied one after the other, for a filter that is a sequence; empty for all others."""
        return ()


class PoolFilter(Filter):
    """A filter that looks at rows together, without ever having the whole pool in memory.

    It works in rounds. In each, `partial` tells of one part of the pool (a shard, a metadata file) what the others must
    know, and `merge` makes one state of all parts' partials. At last `judge` gives the verdict on the rows of a part.
    Partials and states are tables, kept in the cache: a run that was cut off goes on from them. The verdict must not
    depend on how the pool is cut into parts, nor on their order.
    """

    num_rounds: ClassVar[int] = 1
    needs_uid: ClassVar[bool] = True

    def foregone(self, states: Sequence[pl.DataFrame]) -> bool | None:
        """The verdict on every row, where the states alone tell it; None: rows must be looked at."""
        return None

    @property
    def scope(self) -> Literal["row", "pool"]:
        """A filter that needs no round, as some do with some parameters, judges rows by themselves."""
        return "pool" if self.num_rounds else "row"

    def columns(self) -> frozenset[str]:
        """The columns that `partial` and `judge` read."""
        raise NotImplementedError

    def partial(self, table: pl.DataFrame, states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """What round `len(states)` must know of one part.

        Args:
            table: `columns()`, and "uid" if it `needs_uid`, of a part's rows that reached this filter; perhaps none.
            states: of the earlier rounds.
        """
        raise NotImplementedError

    def merge(self, partials: Sequence[pl.LazyFrame], states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The state of round `len(states)`: small, since each process that judges holds it in memory.

        Args:
            partials: of all parts, at least one, in the order of the pool.
            states: of the earlier rounds.
        """
        raise NotImplementedError

    def judge(self, table: pl.DataFrame, states: Sequence[pl.DataFrame], partials: Sequence[pl.DataFrame]) -> pl.Series:
        """The verdict on each row of a part.

        Args:
            table: as `partial` had it.
            states: of all rounds.
            partials: what `partial` returned for this part, by round.
        Returns:
            Boolean series of the table's height; null where a row cannot be judged.
        """
        raise NotImplementedError

    def keep(self, table: pl.DataFrame) -> pl.Series:
        """The verdict on a pool of one part."""
        states: list[pl.DataFrame] = []
        partials: list[pl.DataFrame] = []
        for _ in range(self.num_rounds):
            partials.append(self.partial(table, states))
            states.append(self.merge([partials[-1].lazy()], states))
        return self.judge(table, states, partials).cast(pl.Boolean).alias("keep")


class SharedMerge(PoolFilter):
    """A filter whose merge is work for many: it defines `merge_with` in place of `merge`."""

    def merge(self, partials: Sequence[pl.LazyFrame], states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """As `merge_with`, by this process alone."""
        with alone() as crew:
            return self.merge_with(crew, partials, states)

    def merge_with(self, crew: Crew, partials: Sequence[pl.LazyFrame], states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The state of round `len(states)`, the same whoever the crew is.

        Args:
            crew: who shares the work.
            partials: as `merge` has them.
            states: of the earlier rounds.
        """
        raise NotImplementedError


FILTERS: Registry[type[Filter]] = Registry("filter", package="mmfoundry.data.filters")


def name_of(one: Filter) -> str:
    """The name under which a filter's class is registered."""
    return next((name for name, known in FILTERS.items() if known is type(one)), type(one).__name__)


def undecided(table: pl.DataFrame) -> pl.Series:
    """A verdict of nulls."""
    return pl.Series("keep", [None], dtype=pl.Boolean).new_from_index(0, table.height)
