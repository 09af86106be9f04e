"""Samples of shards that have no index: compressed tars, servers without ranges, commands (`pipe:`).

Each shard is brought to a temporary file, unpacked where it is compressed, and read from there through the one reader
that there is; the next one is brought meanwhile. So damage costs what it hits, and samples within a shard are shuffled.

What is weaker than with a `Pool`: whole shards go to ranks, so ranks may get different numbers of samples; a position
holds for the same ranks and shards only; and to go on from it the shard at hand is brought again, from its start. Turn
such shards into plain tars once (`mmfoundry data convert`) where any of that matters.
"""

import bz2
import glob
import gzip
import lzma
import os
import shlex
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.index import ShardIndex, index_shard
from mmfoundry.data.reader import MAX_MEMBER_BYTES, read_sample
from mmfoundry.data.remote_file import Blocks, RemoteFile, attempt
from mmfoundry.data.remote_source import NoRanges, open_source
from mmfoundry.data.sample import RawSample
from mmfoundry.data.shard_names import ShardSpec, ShardUrl, as_shard, shown
from mmfoundry.data.storage import RemoteOptions
from mmfoundry.data.tally import Skip, Tally
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput, StorageError

PIPE = "pipe:"
_CHUNK = 4 << 20  # bytes
_SHELL = {"|", "||", "&", "&&", ";", "<", ">", ">>", "2>"}
_UNPACKERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}  # by a file's first bytes
_ZSTD = b"\x28\xb5\x2f\xfd"


class Stream:
    """Raw samples, shard by shard: an iterable over what is left of the present epoch, with a position.

    A sample that cannot be read, and what a shard's headers hide, is counted in `tally` and left out.
    """

    def __init__(
        self,
        shards: ShardSpec,
        *,
        allow_pipe: bool = False,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        spool_dir: str | os.PathLike[str] | None = None,
        max_shard_bytes: int = 32 << 30,
        max_member_bytes: int = MAX_MEMBER_BYTES,
        max_unreadable: float = 0.01,
        skip_log: Path | None = None,
        remote: RemoteOptions | None = None,
    ):
        """Take the names of the shards; nothing is read yet.

        Args:
            shards: tars, plain or compressed (gzip, bzip2, xz): paths, folders, patterns, brace ranges, URLs; and
                commands such as `pipe:curl -s https://host/shard-{000..009}.tar`, which write a tar to their output.
            allow_pipe: run commands. They are run without a shell, as this user: allow it for shard lists that you
                wrote, never for those of others.
            seed: of the order of shards and of samples in a shard, another one in each epoch; None keeps it as it is.
            rank: this process's number.
            world_size: number of processes that share the shards; rank r reads each `world_size`-th shard.
            spool_dir: folder for the shards at hand, at most two a rank; by default the system's for temporary files.
            max_shard_bytes: a shard that grows past this, brought or unpacked, is an error.
            max_member_bytes: a sample with a larger member is not read but counted.
            max_unreadable: fraction of the samples that may be left out; see `tally.Tally` for the rule.
            skip_log: JSONL file to which samples that are left out are appended.
            remote: how URLs are read; the disk cache is not used.
        Raises:
            ConfigError: a command where `allow_pipe` is not set or that needs a shell; fewer shards than ranks.
            MissingInput: no shards.
        """
        self.shards = _expand(shards)
        for shard in self.shards:
            if shard.startswith(PIPE):
                _command(shard, allow_pipe)
        if not 0 <= rank < world_size or len(self.shards) < world_size:
            raise ConfigError(
                f"rank {rank} of world size {world_size} with {len(self.shards)} shards: needs 0 <= rank < world size, "
                "and a shard for each rank"
            )
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.tally = Tally(max_unreadable, skip_log)
        self._spool_dir, self._max_shard_bytes, self._max_member_bytes = spool_dir, max_shard_bytes, max_member_bytes
        # a shard is read once and whole, so a cache would only push out what is needed again
        self._remote = replace(remote or RemoteOptions(), cache_bytes=0)
        self._epoch = self._shard = self._sample = 0

    def state_dict(self) -> dict[str, Any]:
        """The position of this rank; plain JSON."""
        return {
            "epoch": self._epoch,
            "shard": self._shard,
            "sample": self._sample,
            "seed": self.seed,
            "rank": self.rank,
            "world_size": self.world_size,
            "shards": [shown(shard) for shard in self.shards],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a saved position when iteration starts anew; the shard at hand is brought again for it.

        Raises:
            ConfigError: seed, rank, world size or shards are not those of the saved state: streams are not elastic.
        """
        mine = self.state_dict()
        for what in ("seed", "rank", "world_size", "shards"):
            if state[what] != mine[what]:
                raise ConfigError(
                    f"the saved position is of a stream with another {what}; streams go on with the same ranks and "
                    "shards only (index the shards to be free of that)"
                )
        self._epoch, self._shard, self._sample = (int(state[what]) for what in ("epoch", "shard", "sample"))

    def __iter__(self) -> Iterator[RawSample]:
        """The samples from the present position to the end of the epoch; the next call goes on with the next epoch.

        Raises:
            StorageError: a server or command failed, or a shard is too large.
            MissingInput: a shard is not there.
            TooManyUnreadable: past `max_unreadable`.
        """
        mine = self._order(len(self.shards), self._epoch)[self.rank :: self.world_size]
        with (
            tempfile.TemporaryDirectory(prefix="mmfoundry-stream-", dir=self._spool_dir) as folder,
            ThreadPoolExecutor(1, thread_name_prefix="stream") as bringing,
        ):
            brought: Future[Path] | None = None
            while self._shard < len(mine):
                place = self._shard
                now = brought or bringing.submit(self._bring, mine[place], Path(folder))
                path = now.result()
                if place + 1 < len(mine):
                    brought = bringing.submit(self._bring, mine[place + 1], Path(folder))
                yield from self._samples(mine[place], path)
                path.unlink()
                self._shard, self._sample = place + 1, 0
        self._epoch, self._shard = self._epoch + 1, 0

    def _order(self, count: int, *what: int) -> list[int]:
        if self.seed is None:
            return list(range(count))
        return np.random.default_rng([self.seed, *what]).permutation(count).tolist()

    def _samples(self, number: int, path: Path) -> Iterator[RawSample]:
        shard = self.shards[number]
        index = index_shard(path)
        if self._sample > len(index):
            raise DamagedInput(
                f"{shown(shard)}: it has {len(index)} samples, and the saved position is past {self._sample}; "
                "it is not what it was"
            )
        if self._sample == 0:
            damage = [self._skip(shard, found.name, found.reason, f"at byte {found.offset}") for found in index.damage]
            self.tally.add(len(damage), damage)
        for local in self._order(len(index), self._epoch, number)[self._sample :]:
            raw = self._read(shard, index, local)
            self._sample += 1
            if raw is not None:
                yield raw

    def _read(self, shard: str, index: ShardIndex, local: int) -> RawSample | None:
        try:
            raw = read_sample(index, local, max_member_bytes=self._max_member_bytes)
        except UnreadableSample as error:
            self.tally.add(1, [self._skip(shard, index.key(local), error.reason, error.detail)])
            return None
        self.tally.add(1)
        return replace(raw, shard=as_shard(shown(shard)))

    def _skip(self, shard: str, key: str, reason: str, detail: str) -> Skip:
        return Skip(shown(self.shards[0]), shown(shard), key, reason, detail)

    def _bring(self, number: int, folder: Path) -> Path:
        """The shard as a plain tar in `folder`."""
        shard, packed = self.shards[number], folder / f"{number}.packed"
        place = as_shard(shard)
        if shard.startswith(PIPE):
            with open(packed, "w+b") as file:
                _run(shard, _Bounded(file, self._max_shard_bytes, shard))
        elif isinstance(place, ShardUrl):
            with open(packed, "w+b") as file:
                _download(shard, _Bounded(file, self._max_shard_bytes, shard), self._remote)
        else:
            packed = place
        with open(packed, "rb") as file:
            head = file.read(6)
        unpacker = next((open_it for magic, open_it in _UNPACKERS.items() if head.startswith(magic)), None)
        if head.startswith(_ZSTD):
            raise DamagedInput(
                f"{shown(shard)}: zstd is not unpacked here; use 'pipe:zstd -dc FILE', or convert it once"
            )
        plain = folder / f"{number}.tar"
        if unpacker is None:
            if packed == place:
                plain.symlink_to(packed.resolve())
            else:
                packed.rename(plain)
            return plain
        with open(plain, "w+b") as file, unpacker(packed, "rb") as source:
            _unpack(source, _Bounded(file, self._max_shard_bytes, shard))
        if packed != place:
            packed.unlink()
        return plain


class _Bounded:
    """A file that refuses to grow past a limit."""

    def __init__(self, file: IO[bytes], limit: int, shard: str):
        self._file, self._left, self._limit, self._shard = file, limit, limit, shard

    def write(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            raise StorageError(
                f"{shown(self._shard)}: more than {self._limit} bytes; raise max_shard_bytes if it is so"
            )
        self._file.write(data)

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._left = self._limit


def _download(url: str, into: _Bounded, options: RemoteOptions) -> None:
    try:
        file = RemoteFile(url, Blocks(options))
    except NoRanges:
        source = open_source(url, options.stall_s)

        def whole() -> None:
            into.restart()
            source.whole(into.write)

        attempt(whole, source, options)
        return
    for offset in range(0, file.size, _CHUNK):
        into.write(file.fetch(offset, min(_CHUNK, file.size - offset)))


def _command(shard: str, allowed: bool) -> list[str]:
    """The words of a command; ConfigError if it must not, or cannot, be run."""
    if not allowed:
        raise ConfigError(f"{shard}: a command, which is run only where `allow_pipe` is set")
    try:
        words = shlex.split(shard.removeprefix(PIPE))
    except ValueError as error:
        raise ConfigError(f"{shard}: {error}") from error
    if not words or _SHELL & set(words):
        raise ConfigError(f"{shard}: give one command; it is run without a shell, so put a pipeline into a script")
    return words


def _run(shard: str, into: _Bounded) -> None:
    """Write a command's output; StorageError if it cannot be run or does not end well."""
    with tempfile.TemporaryFile() as complaints:
        try:
            process = subprocess.Popen(
                _command(shard, allowed=True), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints
            )
        except OSError as error:
            raise StorageError(f"{shard}: it cannot be run: {error}") from error
        assert process.stdout is not None
        try:
            while chunk := process.stdout.read(_CHUNK):
                into.write(chunk)
        except BaseException:
            process.kill()
            raise
        finally:
            process.stdout.close()
            code = process.wait()
        if code:
            complaints.seek(max(0, complaints.seek(0, os.SEEK_END) - 500))
            said = complaints.read().decode("utf-8", "replace").strip()
            raise StorageError(f"{shard}: it ended with code {code}: {said or 'no message'}")


def _unpack(source: Any, into: _Bounded) -> None:
    """What can be unpacked; where the rest is damaged, the tar ends there, and its index says "cut off"."""
    try:
        while chunk := source.read1(_CHUNK):  # what `read` has gathered when it meets the damage is lost
            into.write(chunk)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the data
            raise


def _expand(shards: ShardSpec) -> list[str]:
    from braceexpand import braceexpand  # webdataset's own

    if not isinstance(shards, str | os.PathLike):
        return list(dict.fromkeys(name for item in shards for name in _expand(item)))
    text = os.fspath(shards)
    place = as_shard(text)
    if not text.startswith(PIPE) and isinstance(place, Path) and place.exists():
        found = [str(path) for path in sorted(place.glob("*.tar*")) if not path.name.endswith(".idx")]
        if place.is_dir() and not found:
            raise MissingInput(f"{text}: no *.tar* in this folder")
        return found if place.is_dir() else [text]
    if "{" in text:
        names = list(braceexpand(text))
        if names != [text]:
            return [found for name in names for found in _expand(name)]
    if text.startswith(PIPE) or isinstance(place, ShardUrl):
        return [text]
    names = sorted(name for name in glob.glob(text) if not name.endswith(".idx"))
    if not names:
        raise MissingInput(f"{text}: no such shard; give a tar, a folder, a pattern, a URL or a command")
    return names
