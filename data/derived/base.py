"""What a derivation is: columns that are computed from other columns, and only for the rows that a filter looks at.

A filter after others in a sequence sees few rows; the language of a caption that is too short is never asked for.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import polars as pl

from mmfoundry.data.column import Column
from mmfoundry.pipeline.registry import Registry


@dataclass(frozen=True)
class Models:
    """Files that derivations read in place of what is packaged.

    Attributes:
        language: a fastText model that tells languages.
    """

    language: Path | None = None


PACKAGED = Models()


class Derivation(ABC):
    """A pure function of rows, each by itself, and of the models that it reads."""

    makes: ClassVar[Mapping[str, Column]]
    reads: ClassVar[frozenset[str]]  # may name columns that other derivations make
    dear: ClassVar[bool] = False  # whether what was computed is worth keeping on a disk

    @staticmethod
    @abstractmethod
    def compute(table: pl.DataFrame, models: Models = PACKAGED) -> dict[str, pl.Series]:
        """The columns of `makes` for a table that has `reads`, in its order; null where they cannot be told."""

    @staticmethod
    def files(models: Models) -> tuple[Path, ...]:
        """The files among the models that `compute` reads: what it makes depends on their content."""
        return ()


DERIVATIONS: Registry[type[Derivation]] = Registry("derivation", package="mmfoundry.data.derived")


def derived_columns() -> dict[str, Column]:
    """All columns that derivations make."""
    return {name: column for one in DERIVATIONS.values() for name, column in one.makes.items()}


def maker_of(column: str) -> type[Derivation] | None:
    """The derivation that makes a column; None if it is no derived one."""
    return next((one for one in DERIVATIONS.values() if column in one.makes), None)


def sources_of(columns: Iterable[str]) -> frozenset[str]:
    """The columns that are not derived, from which these can be had."""
    found: set[str] = set()
    for column in columns:
        maker = maker_of(column)
        found |= {column} if maker is None else sources_of(maker.reads)
    return frozenset(found)


def files_of(columns: Iterable[str], models: Models) -> tuple[Path, ...]:
    """The files that making these columns reads, each once."""
    found: dict[Path, None] = {}
    for column in sorted(columns):
        if (maker := maker_of(column)) is not None:
            found |= dict.fromkeys((*maker.files(models), *files_of(maker.reads, models)))
    return tuple(found)


def derive(table: pl.DataFrame, columns: Iterable[str], models: Models = PACKAGED) -> pl.DataFrame:
    """The table with these columns, computing the derived ones that it lacks."""
    for column in columns:
        maker = maker_of(column)
        if column in table.columns or maker is None:
            continue
        table = derive(table, sorted(maker.reads), models)
        made = {name: series for name, series in maker.compute(table, models).items() if name not in table.columns}
        table = table.with_columns(**made)
    return table
