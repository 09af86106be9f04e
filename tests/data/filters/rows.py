"""Metadata tables for tests, one dict a pair."""

from typing import Any

import polars as pl

from mmfoundry.data.columns import COLUMNS, column_named, schema


def table(*rows: dict[str, Any]) -> pl.DataFrame:
    """A metadata table with every column, of scorers those that a row names; what a row leaves out is null.

    uid and place are those of a row's number.
    """
    filled = [
        {"uid": uid(number), "key": str(number), "shard": 0, "index": number, "caption_index": 0, **row}
        for number, row in enumerate(rows)
    ]
    for row in filled:
        row["high"], row["low"] = divmod(int(row["uid"], 16), 2**64)
    names = {name for row in filled for name in row} - set(COLUMNS)
    others = {name: column.dtype for name in sorted(names) if (column := column_named(name)) is not None}
    types = {name: column.dtype for name, column in COLUMNS.items()}
    return pl.DataFrame(filled, schema=types | schema(frozenset(COLUMNS)) | others, orient="row")


def uid(number: int) -> str:
    return f"{number:032x}"
