"""Near rows among all parts of a pool: their codes are laid out in one file, and any worker may search a band."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from mmfoundry.data.crew import Crew
from mmfoundry.data.hamming import Asked, Nearness, band_type, bands_of, fill_bands, pairs_of_band, search_in, settled
from mmfoundry.data.uids import mixed

SHARED = 200_000  # rows from which workers take part: below, handing out jobs takes longer than the work


@dataclass(frozen=True)
class CodedRows:
    """The rows of a pool, each with a code.

    Attributes:
        partials: tables with the codes, one a part.
        column: that has them.
        words: makes uint64 (n, words) of the column.
    """

    partials: Sequence[pl.LazyFrame]
    column: str
    words: Callable[[pl.Series], np.ndarray]

    def named(self, names: Sequence[str]) -> tuple[pl.DataFrame, np.ndarray]:
        """Some columns of all rows; and a mark for each row, uint64 (n,), equal for equal codes.

        It is taken that different codes have different marks: of ten million codes, with a chance of three in a million
        that two have not.
        """
        tables, marks = [], []
        for partial in self.partials:
            table = partial.collect()
            tables.append(table.select(names))
            marks.append(mixed(*self.words(table[self.column]).T) if table.height else np.empty(0, np.uint64))
        return pl.concat(tables), np.concatenate(marks)

    def leaders(self, order: np.ndarray, marks: np.ndarray, nearness: Nearness, crew: Crew) -> np.ndarray:
        """Which rows stay when each is dropped that is near an earlier one that stays.

        Args:
            order: those of all rows that take part, in order of precedence.
            marks: of all rows.
            nearness: of two codes.
            crew: for the search.
        Returns:
            bool (len(order),).
        """
        stays = np.zeros(len(order), bool)
        if len(order):
            # later rows of an equal code are near their first one, or near what that one is near: they never stay
            first = np.sort(np.unique(marks[order], return_index=True)[1])
            stays[first] = self._leaders(order[first], len(marks), nearness, crew)
        return stays

    def _leaders(self, wanted: np.ndarray, total: int, nearness: Nearness, crew: Crew) -> np.ndarray:
        place = np.full(total, -1, np.int32)
        place[wanted] = np.arange(len(wanted))

        def fill(codes: np.ndarray) -> None:
            start = 0
            for partial in self.partials:
                column = partial.select(self.column).collect().to_series()
                here = place[start : start + len(column)]
                start += len(column)
                if (here >= 0).any():
                    codes[here[here >= 0]] = self.words(column)[here >= 0]

        shape = len(wanted), nearness.num_words
        if len(wanted) < SHARED:
            codes = np.empty(shape, np.uint64)
            fill(codes)
            return settled(len(codes), search_in(codes, bands_of(codes, nearness), nearness))
        path = crew.array("codes", shape, np.uint64, fill)
        return _settled_by(crew, path, nearness)


def _settled_by(crew: Crew, codes_path: Path, nearness: Nearness) -> np.ndarray:
    """As `settled`, with the workers of a crew: a job is one band of one search."""
    codes = _mapped(codes_path)
    count = nearness.num_bands(len(codes))

    def fill(bands: np.ndarray) -> None:
        fill_bands(bands, codes, nearness)

    bands_path = crew.array("bands", (len(codes), count), band_type(count), fill)
    bands = _mapped(bands_path)
    numbers = itertools.count()

    def search(asked: Asked) -> np.ndarray:
        number = next(numbers)
        if len(asked.rows) < SHARED:
            return search_in(codes, bands, nearness)(asked)
        rows = crew.array(f"rows-{number}", asked.rows.shape, np.uint32, lambda made: np.copyto(made, asked.rows))
        job = _BandJob(codes_path, bands_path, rows, nearness, asked.first, asked.settled_only)
        jobs = {f"pairs-{number}-{band}": dataclasses.replace(job, band=band) for band in range(count)}
        return np.sort(np.concatenate([table["pair"].to_numpy() for table in crew.tables(_pairs_of_job, jobs)]))

    return settled(len(codes), search)


def _mapped(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r"))


@dataclass(frozen=True)
class _BandJob:
    """One band of a search, with everything that is large in files."""

    codes: Path
    bands: Path
    rows: Path
    nearness: Nearness
    first: int
    settled_only: bool
    band: int = 0


def _pairs_of_job(job: _BandJob) -> pl.DataFrame:
    codes, bands, rows = (_mapped(path) for path in (job.codes, job.bands, job.rows))
    asked = Asked(rows, job.first, job.settled_only)
    return pl.DataFrame({"pair": pairs_of_band(codes, bands, job.nearness, job.band, asked)})
