"""What a filter is: typed parameters, the columns it reads, and a verdict on each row of the metadata table.

A row of the table is a pair: one image with one of its captions (a sample with three captions has three rows, one
without captions has one row whose caption is null). A verdict is True (keep), False (drop) or null (cannot be judged,
because a column is null there); what is null is not kept. A sample is kept while one of its pairs is, and goes on with
the captions of those pairs only. So a filter on captions cuts captions, a filter on images drops samples, and neither
needs to know which of the two it is.
"""

from typing import Literal

import polars as pl

from mmfoundry.pipeline.config import Config
from mmfoundry.pipeline.registry import Registry


class Filter(Config):
    """A pure function of the metadata table; its fields are the parameters that a recipe may set.

    A filter that judges each row by itself defines `expression`. One that looks at rows together (duplicates, a top
    fraction) is of scope "pool" and overrides `scope`, `keep` and `columns`.
    """

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

    def keep(self, table: pl.DataFrame) -> pl.Series:
        """The verdict on each row, in the order of the table.

        Args:
            table: at least `columns()` and "uid", which tells the rows of one sample.
        Returns:
            Boolean series of the table's height; null where a row cannot be judged.
        """
        return table.select("uid", __keep=self.expression().cast(pl.Boolean))["__keep"].alias("keep")

    def parts(self) -> tuple[tuple[str, "Filter"], ...]:
        """Steps that are applied one after the other, for a filter that is a sequence; empty for all others."""
        return ()


FILTERS: Registry[type[Filter]] = Registry("filter", package="mmfoundry.data.filters")


def name_of(one: Filter) -> str:
    """The name under which a filter's class is registered."""
    return next((name for name, known in FILTERS.items() if known is type(one)), type(one).__name__)


def undecided(table: pl.DataFrame) -> pl.Series:
    """A verdict of nulls."""
    return pl.Series("keep", [None], dtype=pl.Boolean).new_from_index(0, table.height)
