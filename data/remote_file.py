"""A shard behind a URL: aligned blocks, kept on a disk (`range_cache.py`), asked for ahead of time and, if lost, again.

What a connection brought before it broke off is kept: the next attempt goes on from there. An outage that outlasts all
attempts stops the run with an error instead of costing samples: what is skipped must not depend on the weather.
"""

import os
import random
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.range_cache import RangeCache
from mmfoundry.data.remote_source import Changed, Source, is_permanent, open_source, reason
from mmfoundry.data.storage import RemoteOptions, ShardFile, user_cache
from mmfoundry.pipeline.errors import MissingInput, StorageError

_Result = TypeVar("_Result")
_PROGRESS_BYTES = 16 << 10  # an attempt that brought this much was no failure
_MEMORY_BLOCKS = 32  # over all shards
_AHEAD_THREADS = 4


class Blocks:
    """What the remote shards of one storage share: the disk cache, the blocks used last, and the read-ahead."""

    def __init__(self, options: RemoteOptions):
        """Open the disk cache; ConfigError where its folder cannot be written."""
        self.options = options
        self._cache: RangeCache | None = None
        if options.cache_bytes:
            self._cache = RangeCache(options.cache_dir or user_cache() / "ranges", options.cache_bytes)
        self._memory: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._asked: set[tuple[str, int]] = set()  # blocks that read-ahead is fetching
        self._lock = threading.Lock()  # of the two above
        self._fetching = [threading.Lock() for _ in range(16)]

    def part(self, file: "RemoteFile", number: int, start: int, count: int) -> bytes:
        """`count` bytes of a block, from its byte `start` on."""
        data = self._from_memory(file.key, number)
        if data is None and self._cache is not None:
            piece = self._cache.read(file.key, number, start, count)
            if piece is not None:
                return piece
        if data is None:
            data = self._block(file, number)
        return data[start : start + count]

    def read_ahead(self, file: "RemoteFile", numbers: range) -> None:
        """Fetch blocks in the background, as far as not enough are on their way already."""
        for number in numbers:
            key = (file.key, number)
            with self._lock:
                if key in self._asked or key in self._memory:
                    continue
                if len(self._asked) >= _AHEAD_THREADS:
                    return
                self._asked.add(key)
            # a daemon: what it fetches is wanted only while the process lives
            threading.Thread(target=self._fetch_ahead, args=(file, number), daemon=True).start()

    def _fetch_ahead(self, file: "RemoteFile", number: int) -> None:
        try:
            self._block(file, number)
        except (StorageError, MissingInput, UnreadableSample):
            return  # whoever needs the block meets the same error
        finally:
            with self._lock:
                self._asked.discard((file.key, number))

    def _block(self, file: "RemoteFile", number: int) -> bytes:
        """A whole block: from memory, from the disk, or fetched, by one thread or process only."""
        with self._one_fetches(file.key, number):
            data = self._from_memory(file.key, number)
            if data is not None:
                return data
            start = number * self.options.block_bytes
            count = min(self.options.block_bytes, file.size - start)
            data = self._cache.read(file.key, number, 0, count) if self._cache else None
            if data is None:
                data = file.fetch(start, count)
                if self._cache:
                    self._cache.write(file.key, number, data)
            with self._lock:
                self._memory[file.key, number] = data
                while len(self._memory) > _MEMORY_BLOCKS:
                    self._memory.popitem(last=False)
            return data

    def _from_memory(self, key: str, number: int) -> bytes | None:
        with self._lock:
            data = self._memory.get((key, number))
            if data is not None:
                self._memory.move_to_end((key, number))
            return data

    @contextmanager
    def _one_fetches(self, key: str, number: int) -> Iterator[None]:
        if self._cache is not None:
            with self._cache.fetching(key, number):
                yield
        else:
            with self._fetching[hash((key, number)) % len(self._fetching)]:
                yield


class RemoteFile(ShardFile):
    """A shard behind a URL; errors as in `ShardFile.read` and `Storage.open`."""

    def __init__(self, url: str, blocks: Blocks):
        """Ask the server for the shard's size and version."""
        self._blocks, self._options = blocks, blocks.options
        self._lock = threading.Lock()
        self._source, self._pid = self._connect(url), os.getpid()
        self.size, self.identity = self._source.size, self._source.version
        # without a version these bytes could be another shard's the next time: they are kept for this opening alone
        version = self.identity or secrets.token_hex(8)
        self.key = f"{url}\n{self.size}\n{version}\n{self._options.block_bytes}"
        self._next, self._steps = 0, 0  # where a reader in sequence would go on, and how often it did; only hints

    def read(self, offset: int, count: int) -> bytes:
        """As `ShardFile.read`; by blocks, except where nothing would keep the rest of a block."""
        count = min(count, self.size - offset)
        if count <= 0:
            return b""
        end, size = offset + count, self._options.block_bytes
        self._steps = self._steps + 1 if 0 <= offset - self._next <= size else 0
        self._next = end
        first, last = offset // size, (end - 1) // size
        in_sequence = self._steps > 1 and self._options.read_ahead > 0
        if not in_sequence and not self._options.cache_bytes:
            return self.fetch(offset, count)
        wanted = max(last, last + self._options.read_ahead if in_sequence else 0)
        parts = []
        for number in range(first, last + 1):
            stop = min(number + self._options.read_ahead, wanted, (self.size - 1) // size)
            self._blocks.read_ahead(self, range(number + 1, stop + 1))
            start = max(offset - number * size, 0)
            parts.append(self._blocks.part(self, number, start, min(end - number * size, size) - start))
        return b"".join(parts)

    def fetch(self, offset: int, count: int) -> bytes:
        """Ask the server for these bytes, past every cache."""
        source = self._connected()
        got = bytearray()

        def go_on() -> bytes:
            if len(got) < count:
                source.fetch(offset + len(got), count - len(got), got)
            return bytes(got)

        return attempt(go_on, source, self._options, got)

    def _connect(self, url: str) -> Source:
        source = open_source(url, self._options.stall_s)
        attempt(source.open, source, self._options)
        return source

    def _connected(self) -> Source:
        """The source; in a process that was forked since, a new one, as fsspec's connections do not survive that."""
        with self._lock:
            if self._pid != os.getpid():
                source = self._connect(self._source.url)
                if (source.size, source.version) != (self.size, self.identity):
                    raise UnreadableSample("shard changed", f"{source.name} is not what it was when opened")
                self._source, self._pid = source, os.getpid()
            return self._source


def attempt(
    work: Callable[[], _Result], source: Source, options: RemoteOptions, progress: bytearray | None = None
) -> _Result:
    """Call `work` until it returns, waiting longer from failure to failure; the errors of `ShardFile.read`.

    Args:
        work: one attempt.
        source: what it reads: which errors pass, and how to call it.
        options: attempts and waits.
        progress: what `work` appends to; an attempt that brought enough is not counted as a failure.
    """
    failures = done = 0
    while True:
        try:
            return work()
        except FileNotFoundError as error:
            raise MissingInput(f"{source.name}: no such shard on the server") from error
        except Changed as error:
            raise UnreadableSample("shard changed", f"{source.name} is not what it was when opened") from error
        except source.transient as error:
            why = reason(error, source)
            if is_permanent(error) or isinstance(error, source.refused):
                raise StorageError(f"{source.name}: access is refused ({why})") from error
            now = len(progress or b"")
            failures, done = 1 if now - done >= _PROGRESS_BYTES else failures + 1, now
            if failures >= options.attempts:
                raise StorageError(
                    f"{source.name}: {failures} attempts failed ({why}); run again to resume once the server answers"
                ) from error
        wait = min(options.max_wait_s, options.first_wait_s * 2 ** (failures - 1))
        time.sleep(
            wait * random.SystemRandom().uniform(0.5, 1)
        )  # ranks that failed together must not come back together
