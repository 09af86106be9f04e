"""Parameters of filters that name a column: it must be there, and hold what the filter can work with."""

import polars as pl

from mmfoundry.data.columns import COLUMNS, JSON_PREFIX, column_named
from mmfoundry.pipeline.errors import UnknownColumn
from mmfoundry.pipeline.registry import unknown

EMBEDDING = pl.List(pl.Float32)


def type_of(name: str) -> pl.DataType:
    """The type of the column of this name.

    Raises:
        UnknownColumn: there is none; the nearest name is given.
    """
    column = column_named(name)
    if column is None:
        raise UnknownColumn(unknown("column", name, list(COLUMNS)))
    return column.dtype


def numeric_column(name: str) -> str:
    """The name, if there is such a column and it holds numbers, or is a value of the JSON that may be one.

    Raises:
        UnknownColumn: there is none; the nearest name is given.
        ValueError: it holds something else.
    """
    dtype = type_of(name)
    if not (dtype.is_numeric() or name.startswith(JSON_PREFIX)):
        raise ValueError(f"{name} is a {dtype}, not a number")
    return name


def embedding_column(name: str) -> str:
    """The name, if a column of that name holds embeddings.

    Raises:
        UnknownColumn: there is none; the nearest name is given.
        ValueError: it holds something else.
    """
    dtype = type_of(name)
    if dtype != EMBEDDING:
        raise ValueError(f"{name} is a {dtype}, not an embedding; those are SCORER_img and SCORER_txt")
    return name
