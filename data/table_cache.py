"""Tables that are dear to make, kept under a name that tells what they were made from, each with its digest.

A run that was cut off, or one whose filters changed in part, takes from here what still holds. What does not agree with
its digest (cut short, altered) is not there.
"""

import hashlib
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import polars as pl

from mmfoundry.pipeline.errors import NotEnoughSpace, disk_full

R = TypeVar("R")
FORMAT = 3  # counts up when what a table of any kind holds changes: those of earlier releases are not looked at
# Kinds that only the passes of a run hand to each other: Arrow IPC, which is written several times as fast, numbers as
# they lie in memory, since most do not get smaller when they are compressed. The others are parquet.
_AS_IN_MEMORY = frozenset({"partial", "state", "verdicts", "derived"})
_ARROW = ".arrow"


@dataclass(frozen=True)
class TableCache:
    """A folder of tables; safe for several processes, each table of which is written by any of them, the same."""

    folder: Path

    def path(self, kind: str, key: str, part: str) -> Path:
        """The place of a table.

        Args:
            kind: what it holds: "table", "partial", "state", ...
            key: what it depends on besides the part.
            part: what tells the part, or the round.
        """
        return self.folder / kind / key / f"{part}{_ARROW if kind in _AS_IN_MEMORY else '.parquet'}"

    def get(self, path: Path) -> pl.DataFrame | None:
        """The table at a place of `path`; None where there is none that is whole."""
        if not self.has(path):
            return None
        try:
            return pl.read_ipc(path) if path.suffix == _ARROW else pl.read_parquet(path, glob=False)
        except FileNotFoundError:  # removed since
            return None

    def scan(self, path: Path) -> pl.LazyFrame:
        """The table at a place that this run wrote or found whole, to be read where and when it is needed."""
        return pl.scan_ipc(path, glob=False) if path.suffix == _ARROW else pl.scan_parquet(path, glob=False)

    def has(self, path: Path) -> bool:
        """Whether there is a whole table at a place."""
        try:
            digest = _digest_path(path).read_text(encoding="ascii")
            whole = _sha256(path) == digest
        except (FileNotFoundError, UnicodeDecodeError):
            return False
        if whole:
            os.utime(path)  # `drop_unused` goes by this
        return whole

    def put(self, path: Path, table: pl.DataFrame) -> None:
        """Write a table, whole or not at all, the same bytes for the same table.

        Raises:
            NotEnoughSpace: the disk is full.
        """

        def write(aside: Path) -> str:
            if path.suffix == _ARROW:
                table.write_ipc(aside, compression="lz4" if pl.String in table.dtypes else "uncompressed")
            else:
                table.write_parquet(aside, compression="lz4")
            return _sha256(aside)

        digest = _write(path, write)
        # after the table: while its digest is missing or another's, the table counts as not there
        _write_digest(path, digest)

    def seal(self, path: Path) -> None:
        """Write the digest of a table that somebody else put at its place, whole."""
        _write_digest(path, _sha256(path))

    def drop_unused(self, since: float) -> int:
        """Remove what nobody asked for since a time (of files, in seconds); returns the bytes that are left."""
        left = 0
        for left_over in self.folder.rglob(".*.part"):  # of a write that was cut off
            if left_over.stat().st_mtime < since:
                left_over.unlink(missing_ok=True)
        # .npy: of a merge that was cut off
        for path in (path for path in self.folder.rglob("*") if path.suffix in (".parquet", ".npy", _ARROW)):
            state = path.stat()
            if state.st_mtime < since:
                _digest_path(path).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            else:
                left += state.st_size
        return left


def key_of(*said: object) -> str:
    """A name for what follows from these values: 32 hex digits, equal for values that are written alike."""
    return hashlib.sha256("\n".join(map(str, (FORMAT, *said))).encode()).hexdigest()[:32]


def _write(path: Path, write: Callable[[Path], R]) -> R:
    """Have a file written whole, but without waiting for the disk: what a power cut cuts off does not fit its digest.

    Args:
        path: of the file.
        write: writes it to another place, from which it is moved; what it returns is returned.
    Raises:
        NotEnoughSpace: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        found = write(aside)
        aside.replace(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        aside.unlink(missing_ok=True)
        if disk_full(error):
            raise NotEnoughSpace(f"{path}: no space left for it; free some and run again") from error
        raise
    return found


def _write_digest(path: Path, digest: str) -> None:
    _write(_digest_path(path), lambda aside: aside.write_text(digest, encoding="ascii"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")
