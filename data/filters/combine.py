"""`all`, `any` and `not`: filters made of filters.

Null (cannot be judged) stays null through `not`, so a row that a filter cannot see is never kept by turning the filter
around.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import polars as pl
from pydantic import Field, SerializeAsAny

from mmfoundry.data.filters.base import FILTERS, Filter, name_of, undecided


def in_sequence(filters: Sequence[Filter], table: pl.DataFrame) -> list[pl.Series]:
    """Verdicts of filters of which each judges only the rows that all earlier ones kept.

    For filters of scope "row" the order changes nothing but the work. One of scope "pool" looks among the rows that
    are left: a duplicate of a dropped row is not a duplicate.

    Returns:
        One Boolean series a filter, of the table's height; null where an earlier filter did not keep the row.
    """
    verdicts = []
    alive = pl.Series("row", range(table.height), dtype=pl.UInt32)
    for one in filters:
        mask = one.keep(table[alive])
        verdicts.append(undecided(table).scatter(alive, mask))
        alive = alive.filter(mask.fill_null(False))
    return verdicts


def and_then(earlier: pl.Series, later: pl.Series) -> pl.Series:
    """The verdict of a sequence: the first that does not keep decides, whatever later ones would have said."""
    return pl.select(pl.when(earlier).then(later).otherwise(earlier)).to_series()


class Combination(Filter):
    """A filter made of filters."""

    def children(self) -> tuple[Filter, ...]:
        """The filters that it is made of."""
        raise NotImplementedError

    @property
    def scope(self) -> Literal["row", "pool"]:
        """The widest of the children's."""
        return "pool" if any(child.scope == "pool" for child in self.children()) else "row"

    def columns(self) -> frozenset[str]:
        """The columns that the children read."""
        return frozenset().union(*(child.columns() for child in self.children()))

    def files(self) -> tuple[Path, ...]:
        """The files that the children's verdicts depend on."""
        return tuple(dict.fromkeys(path for child in self.children() for path in child.files()))


def reader_of(tree: Filter, file: Path) -> Filter:
    """The first filter of a tree, in the order of the config, whose verdict depends on a file of `tree.files()`."""
    if isinstance(tree, Combination):
        return reader_of(next(child for child in tree.children() if file in child.files()), file)
    return tree


@FILTERS.register("all")
class All(Combination):
    """Keeps what every filter keeps, applied in the order given: each looks at what the earlier ones kept."""

    filters: tuple[SerializeAsAny[Filter], ...] = Field(description="applied in this order")

    def children(self) -> tuple[Filter, ...]:
        """The filters, in order."""
        return self.filters

    def keep(self, table: pl.DataFrame) -> pl.Series:
        """True where all filters keep; otherwise the verdict of the first that does not."""
        keep = pl.Series("keep", [True], dtype=pl.Boolean).new_from_index(0, table.height)
        for verdict in in_sequence(self.filters, table):
            keep = and_then(keep, verdict)
        return keep

    def parts(self) -> tuple[tuple[str, Filter], ...]:
        """The filters by name."""
        return tuple((name_of(child), child) for child in self.filters)


@FILTERS.register("any")
class AnyOf(Combination):
    """Keeps what at least one filter keeps; each looks at all rows."""

    filters: tuple[SerializeAsAny[Filter], ...] = Field(description="in any order")

    def children(self) -> tuple[Filter, ...]:
        """The filters."""
        return self.filters

    def keep(self, table: pl.DataFrame) -> pl.Series:
        """True where a filter keeps; null where none does and one cannot judge."""
        keep = pl.Series("keep", [False], dtype=pl.Boolean).new_from_index(0, table.height)
        for child in self.filters:
            keep = keep | child.keep(table)
        return keep


@FILTERS.register("not")
class Not(Combination):
    """Keeps what the filter drops."""

    filter: SerializeAsAny[Filter] = Field(description="turned around")

    def children(self) -> tuple[Filter, ...]:
        """The filter that is turned around."""
        return (self.filter,)

    def keep(self, table: pl.DataFrame) -> pl.Series:
        """True where the filter drops, null where it cannot judge."""
        return ~self.filter.keep(table)
