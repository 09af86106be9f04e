"""Tables that are dear to make, kept under a name that tells what they were made from, each with its digest.

A run that was cut off, or one whose filters changed in part, takes from here what still holds. What does not agree with
its digest (cut short, altered) is not there.
"""

import errno
import hashlib
import io
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from mmfoundry.pipeline.errors import NotEnoughSpace

FORMAT = 2  # counts up when what a table of any kind holds changes: those of earlier releases are not looked at


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
        return self.folder / kind / key / f"{part}.parquet"

    def get(self, path: Path) -> pl.DataFrame | None:
        """The table at a place of `path`; None where there is none that is whole."""
        try:
            data = path.read_bytes()
            if _digest_path(path).read_text(encoding="ascii") != hashlib.sha256(data).hexdigest():
                return None
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        os.utime(path)  # `drop_unused` goes by this
        return pl.read_parquet(io.BytesIO(data))

    def has(self, path: Path) -> bool:
        """Whether there is a whole table at a place."""
        try:
            digest = _digest_path(path).read_text(encoding="ascii")
            with path.open("rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == digest
        except (FileNotFoundError, UnicodeDecodeError):
            return False
        if whole:
            os.utime(path)
        return whole

    def put(self, path: Path, table: pl.DataFrame) -> None:
        """Write a table, whole or not at all, the same bytes for the same table."""
        buffer = io.BytesIO()
        table.write_parquet(buffer, compression="lz4")
        data = buffer.getvalue()
        _write(path, data)
        # after the table: while its digest is missing or another's, the table counts as not there
        _write(_digest_path(path), hashlib.sha256(data).hexdigest().encode())

    def seal(self, path: Path) -> None:
        """Write the digest of a table that somebody else put at its place, whole."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        _write(_digest_path(path), digest.encode())

    def drop_unused(self, since: float) -> int:
        """Remove what nobody asked for since a time (of files, in seconds); returns the bytes that are left."""
        left = 0
        for left_over in self.folder.rglob(".*.part"):  # of a write that was cut off
            if left_over.stat().st_mtime < since:
                left_over.unlink(missing_ok=True)
        arrays = self.folder.rglob("*.npy")  # of a merge that was cut off
        for path in (*self.folder.rglob("*.parquet"), *arrays):
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


def _write(path: Path, data: bytes) -> None:
    """Write a file whole, but without waiting for the disk: what a power cut takes does not agree with its digest.

    Raises:
        NotEnoughSpace: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotEnoughSpace(f"{path}: no space left for {len(data)} bytes; free some and run again") from error
        raise


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")
