"""Bytes of a shard by their place, on a local disk or behind a URL.

storage = Storage(RemoteOptions(cache_bytes=64 << 30))
with storage.open(shard) as file:
    header = file.read(0, 512)
"""

import os
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmfoundry.data.shard_names import ShardUrl, as_shard
from mmfoundry.pipeline.errors import ConfigError, MissingInput

if TYPE_CHECKING:
    from mmfoundry.data.remote_file import Blocks


@dataclass(frozen=True, kw_only=True)
class RemoteOptions:
    """How remote shards are read.

    Attributes:
        cache_dir: folder of the disk cache; None takes `mmfoundry/ranges` in the user's cache folder.
        cache_bytes: what the disk cache may hold; 0 does without, and then only what is asked for is fetched.
        block_bytes: what is fetched at once; many times the size of a sample.
        read_ahead: blocks asked for ahead of a reader that goes on where it stopped; 0 does without.
        attempts: of one request, before the run stops.
        first_wait_s: seconds before the second attempt; doubled for each further one.
        max_wait_s: seconds between two attempts, at most.
        stall_s: seconds without a byte after which an http connection is given up.
    """

    cache_dir: Path | None = None
    cache_bytes: int = 16 << 30
    block_bytes: int = 1 << 20
    read_ahead: int = 4
    attempts: int = 9
    first_wait_s: float = 0.5
    max_wait_s: float = 30.0
    stall_s: float = 30.0

    def __post_init__(self) -> None:
        if self.cache_bytes < 0 or self.block_bytes < 4096 or self.read_ahead < 0 or self.attempts < 1:
            raise ConfigError(f"{self}: needs cache_bytes >= 0, block_bytes >= 4096, read_ahead >= 0, attempts >= 1")
        if min(self.first_wait_s, self.max_wait_s) < 0 or self.stall_s <= 0:
            raise ConfigError(f"{self}: needs waits that are not negative, and stall_s > 0")


class ShardFile(ABC):
    """One shard, opened: any number of threads may read from it at once.

    Attributes:
        size: its bytes.
        identity: what changes when its bytes do: of a local file its time of change in ns; of a remote one its ETag,
            generation or date, "" where the server tells none.
    """

    size: int
    identity: str

    @abstractmethod
    def read(self, offset: int, count: int) -> bytes:
        """The `count` bytes from `offset` on; fewer only where the shard ends.

        Raises:
            UnreadableSample: a remote shard was changed since it was opened.
            MissingInput: a remote shard is gone.
            StorageError: its server failed at every attempt, or refuses.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Let go of what the operating system holds for it; it is not read any more."""

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalFile(ShardFile):
    """A shard on a disk, read by `pread`; closed when the last reader lets go of it."""

    def __init__(self, path: Path):
        """Open it; FileNotFoundError if it is not there."""
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self._descriptor)
        self.size, self.mtime_ns = status.st_size, status.st_mtime_ns
        self.identity = str(status.st_mtime_ns)

    def read(self, offset: int, count: int) -> bytes:
        """As `ShardFile.read`."""
        data = os.pread(self._descriptor, count, offset)
        while len(data) < count:  # a read may be short on network disks, and of more than 2 GiB
            more = os.pread(self._descriptor, count - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def close(self) -> None:
        """Close the descriptor; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


class Storage:
    """Opens shards; remote ones opened by one storage share its disk cache, its memory and its read-ahead."""

    def __init__(self, options: RemoteOptions | None = None):
        """Nothing is opened or made before the first remote shard is."""
        self.options = options or RemoteOptions()
        self._blocks: Blocks | None = None
        self._lock = threading.Lock()

    def open(self, shard: str | os.PathLike[str]) -> ShardFile:
        """Open a shard: a path, or a URL of a scheme in `remote_source.SCHEMES`.

        Raises:
            MissingInput: there is none, or the package that reads such URLs is not installed.
            ConfigError: a URL of a scheme that is not read, or a cache folder that cannot be written.
            StorageError: its server did not answer at all attempts, refuses, or serves no ranges.
        """
        place = as_shard(shard)
        if isinstance(place, ShardUrl):
            from mmfoundry.data.remote_file import Blocks, RemoteFile  # most pools are local

            with self._lock:
                if self._blocks is None:
                    self._blocks = Blocks(self.options)
            return RemoteFile(str(place), self._blocks)
        try:
            return LocalFile(place)
        except FileNotFoundError as error:
            raise MissingInput(f"{place}: no such shard") from error


def user_cache() -> Path:
    """Our folder in the user's cache: `$XDG_CACHE_HOME/mmfoundry`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmfoundry"
