"""Ranges of remote shards on a local disk: bounded, the least recently used go first, shared by processes.

One file a block, named by a hash of what it is a part of. Each carries checksums of its pieces, so a block that a power
cut or a bad disk has spoiled is fetched again instead of being handed on. All files are written, counted and removed
under one lock (`flock`, which the kernel takes back from a process that dies), so the folder never holds more than its
limit, however many processes write to it.
"""

import fcntl
import hashlib
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmfoundry.pipeline.errors import ConfigError

_MAGIC = b"MMFRNG01"
_PIECE = 64 << 10  # bytes under one checksum: a small sample must not cost the reading of its whole block
_LOCKS = 64  # blocks that may be fetched at once, at most, over all processes
_KEEP = 0.9  # of the limit is left after a sweep, so that not every write needs one


class RangeCache:
    """Blocks of bytes by (identity of the whole, number), for any number of threads and processes."""

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int):
        """Open the cache in `folder`, making it if it is missing.

        Args:
            folder: on a local disk, or on a network disk whose `flock` reaches all that use it.
            max_bytes: of all its files together. Processes that share a folder should agree on it; each keeps to its
                own.
        Raises:
            ConfigError: the folder cannot be written.
        """
        self.folder, self.max_bytes = Path(folder), max_bytes
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            (self.folder / "blocks").mkdir(exist_ok=True)
            with self._locked("write"):
                pass
        except OSError as error:
            raise ConfigError(
                f"{folder}: the cache of remote shards cannot be kept here ({error.strerror}); name another folder "
                "(`cache_dir`, or XDG_CACHE_HOME), or do without (`cache_bytes: 0`)"
            ) from error

    def read(self, identity: str, number: int, start: int, count: int) -> bytes | None:
        """Bytes `start` to `start + count` of a block; None if the block is not here, or not as it was written."""
        path = self._path(identity, number)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            data = _read_block(descriptor, start, count)
            if data is None:
                path.unlink(missing_ok=True)
            else:
                os.utime(descriptor)  # the time of change is the time of last use
            return data
        finally:
            os.close(descriptor)

    def write(self, identity: str, number: int, data: bytes) -> bool:
        """Keep a block, removing others where it must; False if the limit or the disk has no room for it."""
        crcs = b"".join(zlib.crc32(data[at : at + _PIECE]).to_bytes(4, "little") for at in range(0, len(data), _PIECE))
        block = _MAGIC + len(data).to_bytes(8, "little") + crcs + data
        path = self._path(identity, number)
        if len(block) > self.max_bytes:
            return False
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with self._locked("write") as descriptor:
            used = self._used(descriptor)
            if used + len(block) > self.max_bytes:
                used = self._sweep(int(self.max_bytes * _KEEP) - len(block))
            self._set_used(descriptor, used + len(block))
            try:
                path.parent.mkdir(exist_ok=True)
                temporary.write_bytes(block)
                temporary.replace(path)
            except OSError:  # a full disk: the bytes are in hand, only the next reader has to fetch them again
                temporary.unlink(missing_ok=True)
                return False
        return True

    @contextmanager
    def fetching(self, identity: str, number: int) -> Iterator[None]:
        """Hold the right to fetch a block, so that processes which want the same one do not all ask the server."""
        with self._locked(f"{int(_name(identity, number)[:8], 16) % _LOCKS:02d}"):
            yield

    def used_bytes(self) -> int:
        """Bytes of the blocks that are here, counted now."""
        with self._locked("write"):  # else a block could be counted that goes to make room for the next
            return self._count()

    def _count(self) -> int:
        return sum(entry.stat().st_size for entry in self._entries())

    def _path(self, identity: str, number: int) -> Path:
        name = _name(identity, number)
        return self.folder / "blocks" / name[:2] / name[2:]

    @contextmanager
    def _locked(self, name: str) -> Iterator[int]:
        # opened anew each time: a lock belongs to the open file, so threads of one process exclude each other, too
        descriptor = os.open(self.folder / "locks" / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            # said, not left to the close: a process forked meanwhile has the file open as well
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _used(self, descriptor: int) -> int:
        """The count kept in the lock's own file; counted anew where there is none, or half of one."""
        data = os.pread(descriptor, 16, 0)
        return int.from_bytes(data, "little") if len(data) == 8 else self._count()

    def _set_used(self, descriptor: int, used: int) -> None:
        os.pwrite(descriptor, used.to_bytes(8, "little"), 0)

    def _sweep(self, target: int) -> int:
        """Remove blocks, least recently used first, until `target` bytes are left; returns what is left."""
        found = []
        for entry in self._entries():
            status = entry.stat()
            # a temporary file is from a process that died: those that live write under the lock that is held here
            found.append((0 if entry.name.startswith(".") else status.st_mtime_ns, status.st_size, entry))
        left = sum(size for _, size, _ in found)
        for _, size, entry in sorted(found, key=lambda row: row[0]):
            if left <= target:
                break
            Path(entry).unlink(missing_ok=True)
            left -= size
        return left

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        for folder in os.scandir(self.folder / "blocks"):
            if folder.is_dir():
                yield from os.scandir(folder)


def _name(identity: str, number: int) -> str:
    return hashlib.sha256(f"{identity}\0{number}".encode()).hexdigest()[:40]


def _read_block(descriptor: int, start: int, count: int) -> bytes | None:
    head = os.pread(descriptor, 16, 0)
    if len(head) < 16 or head[:8] != _MAGIC:
        return None
    length = int.from_bytes(head[8:], "little")
    pieces = -(-length // _PIECE)
    first, last = start // _PIECE, (start + count - 1) // _PIECE
    payload = 16 + 4 * pieces
    if start + count > length or os.fstat(descriptor).st_size != payload + length:
        return None
    crcs = os.pread(descriptor, 4 * (last - first + 1), 16 + 4 * first)
    data = os.pread(descriptor, (last - first + 1) * _PIECE, payload + first * _PIECE)
    for at in range(last - first + 1):
        if zlib.crc32(data[at * _PIECE : (at + 1) * _PIECE]) != int.from_bytes(crcs[4 * at : 4 * at + 4], "little"):
            return None
    return data[start - first * _PIECE : start - first * _PIECE + count]
