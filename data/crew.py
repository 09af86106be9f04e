"""Who takes part in merging what the parts of a pool said: the workers of an executor, which share a folder.

What is large lies there as an array in a file, which every process maps; what a worker finds is a table. Both are
written whole and have their digests, so that a merge that was cut off goes on from them.
"""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl

from mmfoundry.data.executors import Executor, SerialExecutor
from mmfoundry.data.table_cache import TableCache
from mmfoundry.pipeline.errors import NotEnoughSpace

J = TypeVar("J")


@dataclass(frozen=True)
class Crew:
    """Workers, and the folder for what they share.

    Attributes:
        folder: seen by all of them under this path; for one merge alone. Nothing is in it until it is needed.
        executor: who does jobs; to be called from this process only.
    """

    folder: Path
    executor: Executor

    def array(self, name: str, shape: tuple[int, ...], dtype: type, fill: Callable[[np.ndarray], None]) -> Path:
        """A file with an array, for `np.load(path, mmap_mode="r")`; made now unless an earlier run has left it.

        Args:
            name: of the array, once in the merge.
            shape: of the array, not empty.
            dtype: of its numbers.
            fill: writes all of them.
        Raises:
            NotEnoughSpace: the disk is full.
        """
        path, cache = self.folder / f"{name}.npy", TableCache(self.folder)
        if cache.has(path):
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            made = np.lib.format.open_memmap(aside, "w+", dtype, shape)
            with aside.open("r+b") as file:  # a full disk would end the process where the array is written
                os.posix_fallocate(file.fileno(), 0, aside.stat().st_size)
            fill(made)
            made.flush()
            del made
            aside.replace(path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NotEnoughSpace(f"{path}: no space for an array of {shape}; free some and run again") from error
            raise
        finally:
            aside.unlink(missing_ok=True)
        cache.seal(path)
        return path

    def tables(self, task: Callable[[J], pl.DataFrame], jobs: Mapping[str, J]) -> list[pl.DataFrame]:
        """What a task makes of each job, by any of the workers; what an earlier run has left is not made again.

        Args:
            task: a function of a module.
            jobs: by name, each name once in the merge.
        """
        cache = TableCache(self.folder)
        pieces = [_Piece(name, job, cache, self.folder / f"{name}.parquet") for name, job in jobs.items()]
        self.executor.map(partial(_make, task), pieces, lambda number, nothing: None)
        found = [cache.get(piece.place) for piece in pieces]
        missing = [piece.name for piece, table in zip(pieces, found, strict=True) if table is None]
        if missing:
            raise FileNotFoundError(f"{self.folder}: {missing[0]} is not there, or altered, while the run goes on")
        return [table for table in found if table is not None]


@dataclass(frozen=True)
class _Piece:
    name: str
    job: Any
    cache: TableCache
    place: Path


def _make(task: Callable[[Any], pl.DataFrame], piece: _Piece) -> None:
    if not piece.cache.has(piece.place):
        piece.cache.put(piece.place, task(piece.job))


@contextmanager
def alone() -> Iterator[Crew]:
    """This process, with a folder that goes when it is done."""
    with tempfile.TemporaryDirectory(prefix="mmfoundry_merge_") as folder:
        yield Crew(Path(folder), SerialExecutor())
