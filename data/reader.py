"""Bytes of one sample by its number, in one shard or over many."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from threading import Lock
from typing import Any

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.index import Member, ShardIndex, expand_shards, open_indexes, require_samples
from mmfoundry.data.sample import RawSample
from mmfoundry.data.shard_names import Shard, ShardSpec, ShardUrl, shown
from mmfoundry.data.storage import RemoteOptions, ShardFile, Storage
from mmfoundry.data.tally import Skip
from mmfoundry.data.tar import Damage
from mmfoundry.pipeline.errors import DamagedInput, MissingInput

MAX_MEMBER_BYTES = 64 << 20
_MAX_SAMPLE_BYTES = 256 << 20  # of all members together, lest many that are large fill the memory
_MAX_OPEN_SHARDS = 512  # a window of the order touches 256
_JOIN_BYTES = 4 << 20  # members this close together come in one read


class Pool:
    """Samples of many shards under one running number, in the order of the shards.

    Shards lie on a disk or behind URLs. Every read names its place, so one pool serves many threads. Sent to another
    process, it is opened anew there.
    """

    def __init__(
        self,
        shards: ShardSpec,
        *,
        name: str = "",
        save_index: bool = True,
        max_member_bytes: int = MAX_MEMBER_BYTES,
        index_dir: str | os.PathLike[str] | None = None,
        remote: RemoteOptions | None = None,
    ):
        """Open the shards' indexes, making those that are missing or stale.

        Args:
            shards: what `index.expand_shards` takes.
            name: what to call this pool in messages and counts, by default what was given for `shards`; of a URL,
                user, password and query are left out.
            save_index: keep new indexes, where that is possible.
            max_member_bytes: a sample with a larger member is not read but reported, so that a hostile shard
                cannot fill the memory.
            index_dir: folder for indexes; by default beside each shard, for remote ones in the user's cache.
            remote: how shards behind URLs are read.
        Raises:
            MissingInput: no shards, or no readable sample in them.
            StorageError: a server failed at every attempt, refuses, or serves no ranges.
        """
        self._options: dict[str, Any] = {"save_index": save_index, "max_member_bytes": max_member_bytes}
        self._options |= {"index_dir": index_dir, "remote": remote}
        self.shards = expand_shards(shards)
        self.name = shown(name or (shards if isinstance(shards, str | os.PathLike) else self.shards[0]))
        self.max_member_bytes = max_member_bytes
        storage = Storage(remote)
        self.indexes = open_indexes(self.shards, save=save_index, index_dir=index_dir, storage=storage)
        require_samples(self.indexes, self.name)
        self._ends = list(accumulate(len(index) for index in self.indexes))
        self._files = _OpenFiles(storage)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process opens the indexes for itself: they are mapped, and would be sent whole.
        return _open_again, (self.shards, self._options | {"name": self.name}, (len(self), self.total_bytes))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def total_bytes(self) -> int:
        """Size of all shards."""
        return sum(index.shard_bytes for index in self.indexes)

    @property
    def damage(self) -> list[tuple[Shard, Damage]]:
        """What the indexes could not read: shard, and place and reason in it."""
        return [(index.shard, damage) for index in self.indexes for damage in index.damage]

    def damage_skips(self) -> list[Skip]:
        """What the indexes could not read, as it is counted and logged."""
        return [
            Skip(self.name, shown(shard), found.name, found.reason, f"at byte {found.offset}")
            for shard, found in self.damage
        ]

    def skip(self, number: int, error: UnreadableSample, position: int | None = None) -> Skip:
        """Sample `number`, which could not be used, as it is counted and logged; `position` as in `tally.Skip`."""
        index, local = self.locate(number)
        return Skip(self.name, shown(index.shard), index.key(local), error.reason, error.detail, position)

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
            UnreadableSample: a member is over `max_member_bytes`, the shard is shorter than its index says, or it
                was changed on its server.
            MissingInput: the shard is gone.
            StorageError: its server failed at every attempt, or refuses.
        """
        index, local = self.locate(number)
        return _read(self._files, index, local, extensions, self.max_member_bytes)


def _open_again(shards: list[Shard], options: dict[str, Any], expected: tuple[int, int]) -> Pool:
    """The pool that another process has open; refused where its shards have changed since."""
    pool = Pool(shards, **options)
    if (len(pool), pool.total_bytes) != expected:
        raise DamagedInput(f"{pool.name}: the shards changed while they are read from; leave them alone during a run")
    return pool


def read_sample(
    index: ShardIndex,
    number: int,
    extensions: Sequence[str] | None = None,
    max_member_bytes: int = MAX_MEMBER_BYTES,
    remote: RemoteOptions | None = None,
) -> RawSample:
    """Read one sample of one shard; arguments and errors as for `Pool` and in `Pool.get`."""
    return _read(_OpenFiles(Storage(remote)), index, number, extensions, max_member_bytes)


class _OpenFiles:
    """The shards read last, kept open; one evicted while a thread reads from it closes when that read is done."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._files: OrderedDict[Shard, ShardFile] = OrderedDict()
        self._lock = Lock()

    def get(self, index: ShardIndex) -> ShardFile:
        with self._lock:
            file = self._files.get(index.shard)
            if file is not None:
                self._files.move_to_end(index.shard)
                return file
        # opened without the lock: a server that is slow to answer must not hold up the readers of other shards
        try:
            file = self._storage.open(index.shard)
        except MissingInput as error:
            if isinstance(index.shard, ShardUrl):
                raise
            raise MissingInput(f"{index.shard}: the shard is gone since it was indexed; put it back") from error
        if isinstance(index.shard, ShardUrl) and (file.size, file.identity) != (index.shard_bytes, index.identity):
            raise UnreadableSample("shard changed", "it is not the one that was indexed")
        with self._lock:
            file = self._files.setdefault(index.shard, file)
            if len(self._files) > _MAX_OPEN_SHARDS:
                self._files.popitem(last=False)
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
    total = sum(member.size for member in members)
    if total > _MAX_SAMPLE_BYTES:
        raise UnreadableSample("too many bytes", f"{len(members)} members have {total} > {_MAX_SAMPLE_BYTES}")
    payloads: dict[str, bytes] = {}
    if members:
        file = files.get(index)
        for group in _runs(members):
            start = group[0].offset
            count = group[-1].offset + group[-1].size - start
            data = file.read(start, count)
            if len(data) < count:
                raise UnreadableSample("shard changed", "it is shorter than its index says")
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
