"""Metadata tables for tests, one dict a pair."""

from typing import Any

import polars as pl

from mmfoundry.data.columns import COLUMNS, schema


def table(*rows: dict[str, Any]) -> pl.DataFrame:
    """A metadata table with every column; what a row leaves out is null, its uid and place are its number's."""
    filled = [
        {"uid": uid(number), "key": str(number), "shard": 0, "index": number, "caption_index": 0, **row}
        for number, row in enumerate(rows)
    ]
    names = {name for row in filled for name in row if name.startswith("json.")}
    types = {name: column.dtype for name, column in COLUMNS.items()}
    return pl.DataFrame(filled, schema=types | schema(frozenset(COLUMNS) | names), orient="row")


def uid(number: int) -> str:
    return f"{number:032x}"
