"""A pool cut into parts in any way: how a `PoolFilter` judges it, and drawn cuts."""

import polars as pl
from hypothesis import strategies as st

from mmfoundry.data.filters.base import PoolFilter


def keep_in_parts(one: PoolFilter, parts: list[pl.DataFrame]) -> pl.Series:
    """The verdicts on the rows of all parts, one part after the other."""
    states: list[pl.DataFrame] = []
    partials: list[list[pl.DataFrame]] = [[] for _ in parts]
    for _ in range(one.num_rounds):
        for part, found in zip(parts, partials, strict=True):
            found.append(one.partial(part, states))
        states.append(one.merge([found[-1].lazy() for found in partials], states))
    verdicts = [one.judge(part, states, found) for part, found in zip(parts, partials, strict=True)]
    return pl.concat([verdict.cast(pl.Boolean).rename("keep") for verdict in verdicts])


@st.composite
def cuts_of(draw: st.DrawFn, table: pl.DataFrame) -> tuple[list[int], list[pl.DataFrame]]:
    """The rows of a table dealt out to parts, some perhaps empty, in any order; the rows of one sample stay together.

    Returns:
        The number in the table of each row of the parts, one part after the other; and the parts.
    """
    count = draw(st.integers(1, 5))
    key = [name for name in ("uid", "shard", "index") if name in table.columns]
    ids = table.select(pl.struct(key).rank("dense"))[:, 0].to_list()
    part_of = {one: draw(st.integers(0, count - 1)) for one in sorted(set(ids))}
    order = draw(st.permutations(range(table.height)))
    rows = [[row for row in order if part_of[ids[row]] == part] for part in range(count)]
    return [row for part in rows for row in part], [table[part] for part in rows]


def assert_cuts_do_not_matter(one: PoolFilter, table: pl.DataFrame, data: st.DataObject) -> list[bool | None]:
    """Judge a pool whole and in parts, expect the same verdict on every row, and return it."""
    whole = one.keep(table).to_list()
    rows, parts = data.draw(cuts_of(table))
    in_parts = keep_in_parts(one, parts).to_list()
    assert dict(zip(rows, in_parts, strict=True)) == dict(enumerate(whole))
    return whole
