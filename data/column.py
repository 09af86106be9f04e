"""What one column of a pool's metadata table is."""

from dataclasses import dataclass
from typing import Literal

import polars as pl


@dataclass(frozen=True)
class Column:
    """One column of the metadata table.

    Attributes:
        dtype: its polars type.
        needs: what must be looked at to compute it, from cheap to dear; "metadata" is there only where the pool has it,
            "table" is derived from other columns (`derived/`), "model" is computed by a scorer.
        about: one line for people.
    """

    dtype: pl.DataType
    needs: Literal["metadata", "text", "table", "header", "bytes", "pixels", "model"]
    about: str
