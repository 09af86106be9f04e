"""Bytes of one sample by its number, in one shard or over many."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from threading import Lock

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.index import Member, ShardIndex, ShardSpec, expand_shards, open_index, require_samples
from mmfoundry.data.sample import RawSample
from mmfoundry.data.tar import Damage
from mmfoundry.pipeline.errors import MissingInput

MAX_MEMBER_BYTES = 64 << 20
_MAX_OPEN_SHARDS = 128
_JOIN_BYTES = 4 << 20  # members this close together come in one read


class Pool:
    """Samples of many shards under one running number, in the order of the shards.

    Reads are positioned (`pread`), so one pool serves many threads and, after a fork, many processes.
    """

    def __init__(
        self,
        shards: ShardSpec,
        *,
        name: str = "",
        save_index: bool = True,
        max_member_bytes: int = MAX_MEMBER_BYTES,
    ):
        """Open the shards' indexes, making those that are missing or stale.

        Args:
            shards: what `index.expand_shards` takes.
            name: what to call this pool in messages and counts; by default what was given for `shards`.
            save_index: keep new indexes beside their shards where that is possible.
            max_member_bytes: a sample with a larger member is not read but reported, so that a hostile shard
                cannot fill the memory.
        Raises:
            MissingInput: no shards, or no readable sample in them.
        """
        self.shards = expand_shards(shards)
        self.name = name or (os.fspath(shards) if isinstance(shards, str | os.PathLike) else os.fspath(self.shards[0]))
        self.max_member_bytes = max_member_bytes
        self.indexes = [open_index(shard, save=save_index) for shard in self.shards]
        require_samples(self.indexes, self.name)
        self._ends = list(accumulate(len(index) for index in self.indexes))
        self._files = _OpenFiles()

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def total_bytes(self) -> int:
        """Size of all shards."""
        return sum(index.shard_bytes for index in self.indexes)

    @property
    def damage(self) -> list[tuple[Path, Damage]]:
        """What the indexes could not read: shard, and place and reason in it."""
        return [(index.shard, damage) for index in self.indexes for damage in index.damage]

    def locate(self, number: int) -> tuple[ShardIndex, int]:
        """The shard that holds sample `number`, and its number there.

        Raises:
            IndexError: not 0 <= number < len(pool).
        """
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        shard = bisect_right(self._ends, number)
        return self.indexes[shard], number - (self._ends[shard - 1] if shard else 0)

    def key(self, number: int) -> str:
        """The key of sample `number`, from the index."""
        index, local = self.locate(number)
        return index.key(local)

    def get(self, number: int, extensions: Sequence[str] | None = None) -> RawSample:
        """Read sample `number`.

        Args:
            number: 0 <= number < len(pool).
            extensions: read only these members; all by default.
        Raises:
            UnreadableSample: a member is over `max_member_bytes`, or the shard is shorter than its index says.
            MissingInput: the shard is gone.
        """
        index, local = self.locate(number)
        return _read(self._files, index, local, extensions, self.max_member_bytes)


def read_sample(
    index: ShardIndex, number: int, extensions: Sequence[str] | None = None, max_member_bytes: int = MAX_MEMBER_BYTES
) -> RawSample:
    """Read one sample of one shard; arguments and errors as in `Pool.get`."""
    return _read(_OpenFiles(), index, number, extensions, max_member_bytes)


class _OpenFile:
    """A descriptor that is closed when the last reader lets go of it."""

    __slots__ = ("descriptor",)

    def __init__(self, path: Path):
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class _OpenFiles:
    """The shards read last, kept open; one evicted while a thread reads from it closes when that read is done."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._lock = Lock()

    def get(self, path: Path) -> _OpenFile:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                try:
                    file = self._files[path] = _OpenFile(path)
                except FileNotFoundError as error:
                    raise MissingInput(f"{path}: the shard is gone since it was indexed; put it back") from error
                if len(self._files) > _MAX_OPEN_SHARDS:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(path)
            return file


def _read(
    files: _OpenFiles, index: ShardIndex, number: int, extensions: Sequence[str] | None, max_member_bytes: int
) -> RawSample:
    members = index.members(number)
    if extensions is not None:
        members = [member for member in members if member.extension in extensions]
    for member in members:
        if member.size > max_member_bytes:
            raise UnreadableSample("too many bytes", f"{member.extension} has {member.size} > {max_member_bytes}")
    payloads: dict[str, bytes] = {}
    if members:
        file = files.get(index.shard)
        for group in _runs(members):
            start = group[0].offset
            data = _read_exactly(file.descriptor, start, group[-1].offset + group[-1].size - start)
            for member in group:
                payloads[member.extension] = data[member.offset - start : member.offset - start + member.size]
    return RawSample(key=index.key(number), members=payloads, shard=index.shard)


def _runs(members: Sequence[Member]) -> list[list[Member]]:
    """Cut members into runs that are worth one read each; members are in order of their place."""
    runs: list[list[Member]] = []
    for member in members:
        if runs and member.offset + member.size - runs[-1][0].offset <= _JOIN_BYTES:
            runs[-1].append(member)
        else:
            runs.append([member])
    return runs


def _read_exactly(descriptor: int, offset: int, count: int) -> bytes:
    data = os.pread(descriptor, count, offset)
    while len(data) < count:  # a read may be short on network disks, and of more than 2 GiB
        more = os.pread(descriptor, count - len(data), offset + len(data))
        if not more:
            raise UnreadableSample("shard changed", "it is shorter than its index says")
        data += more
    return data
