"""Write webdataset tars: whole or absent, and the same bytes for the same samples.

A sample is a dict in webdataset's manner: `{"__key__": "000001", "png": bytes, "txt": "a red apple", "json": {...}}`.
The reading side is `index.py` (what is where) and `reader.py` (bytes by sample number).
"""

import errno
import json
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mmfoundry.data.index import drop_index, index_shard, save_index
from mmfoundry.pipeline.errors import NotEnoughSpace

BLOCK = 512  # bytes; tar stores headers and payloads in whole blocks


def write_shards(
    samples: Iterable[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    pattern: str = "shard-%05d.tar",
    max_count: int = 10_000,
    max_bytes: int = 1 << 30,
) -> list[Path]:
    """Write samples into numbered tars and an index beside each.

    Owner, time and mode of every member are fixed and a sample's members are in order of their extension, so equal
    samples give equal bytes. A shard is written under a temporary name, synced and renamed: under its own name it
    is whole. Shards of `pattern` that an earlier call left in `folder` are replaced, surplus ones removed.

    Args:
        samples: dicts with `__key__` (unique within a shard, without a dot in its last part) and, by extension,
            bytes, str (written as UTF-8), or dict/list (written as JSON with sorted keys). Other entries that start
            with `_` are left out.
        folder: made if missing.
        pattern: file name with one `%05d`-like place for the shard number, counted from 0.
        max_count: samples per shard, at most.
        max_bytes: bytes of headers and payloads per shard, at most; a sample larger than this gets its own shard.
    Returns:
        The shards' paths, in order; empty if there were no samples.
    Raises:
        ValueError: a key that cannot be read back, a repeated key, or a value of another type.
        NotEnoughSpace: the disk is full; shards written before are whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, batch in enumerate(_batches(samples, max_count, max_bytes)):
        path = folder / (pattern % number)
        _write_shard(path, batch)
        paths.append(path)
    surplus = len(paths)
    while (stale := folder / (pattern % surplus)).exists():
        drop_index(stale)
        stale.unlink()
        surplus += 1
    return paths


def write_shard(path: str | os.PathLike[str], samples: Iterable[Mapping[str, Any]]) -> Path:
    """Write one shard under the name given, as `write_shards` does; for shards that are made one by one, in any order.

    Args:
        path: of the tar; an earlier file of that name is replaced once the new one is whole.
        samples: as for `write_shards`; at least one.
    Raises:
        ValueError: as for `write_shards`, or there are no samples.
        NotEnoughSpace: the disk is full; nothing was replaced.
    """
    path = Path(path)
    stream = _Peekable(map(_encode, samples))
    if stream.head is None:
        raise ValueError(f"{path}: a shard needs a sample")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_shard(path, _batch(stream, sys.maxsize, sys.maxsize))
    return path


class _Peekable:
    """An iterator whose next item can be seen without taking it."""

    def __init__(self, items: Iterator[dict[str, Any]]):
        self._items = items
        self.head = next(items, None)

    def take(self) -> dict[str, Any]:
        head = self.head
        assert head is not None
        self.head = next(self._items, None)
        return head


def _batches(
    samples: Iterable[Mapping[str, Any]], max_count: int, max_bytes: int
) -> Iterator[Iterator[dict[str, Any]]]:
    """Cut the stream into shards without holding a shard in memory; each batch is used up before the next is asked."""
    stream = _Peekable(map(_encode, samples))
    while stream.head is not None:
        yield _batch(stream, max_count, max_bytes)


def _batch(stream: _Peekable, max_count: int, max_bytes: int) -> Iterator[dict[str, Any]]:
    count = size = 0
    keys: set[str] = set()
    while stream.head is not None:
        members = {name: data for name, data in stream.head.items() if name != "__key__"}
        more = sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for data in members.values())
        if count and (count >= max_count or size + more > max_bytes):
            return
        sample = stream.take()
        if sample["__key__"] in keys:
            raise ValueError(f"key {sample['__key__']!r} comes twice in one shard")
        keys.add(sample["__key__"])
        count, size = count + 1, size + more
        yield sample


def _encode(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample with its values as bytes; ValueError if it could not be read back as it was given."""
    key = sample.get("__key__")
    if not isinstance(key, str) or not key:
        raise ValueError(f"a sample needs a __key__, a string that is not empty; this one has {key!r}")
    parts = key.split("/")
    if "" in parts or "." in parts[-1] or ".." in parts or "\0" in key:
        raise ValueError(f"key {key!r}: no dot in its last part, no empty part, no '..'")
    encoded: dict[str, Any] = {"__key__": key}
    for name, value in sample.items():
        if name.startswith("_"):
            continue
        if not name or "/" in name or name != name.lower():
            raise ValueError(f"key {key!r}: {name!r} cannot be an extension; use lower case without '/'")
        if isinstance(value, dict | list):
            value = json.dumps(value, sort_keys=True, ensure_ascii=False)
        if isinstance(value, str):
            value = value.encode("utf-8")
        if not isinstance(value, bytes | bytearray | memoryview):
            raise ValueError(f"key {key!r}: {name} is {type(value).__name__}; give bytes, str, dict or list")
        encoded[name] = bytes(value)
    if len(encoded) == 1:
        raise ValueError(f"key {key!r}: the sample has no members")
    return encoded


def _write_shard(path: Path, samples: Iterator[dict[str, Any]]) -> None:
    from webdataset import TarWriter  # imports torch, which readers of this module may not need

    drop_index(path)  # an index must never be older than its shard
    with _telling_of_a_full_disk(path):
        with _replacing(path) as file, TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
            for sample in samples:
                tar.write(sample)
        save_index(index_shard(path, digest=True), path)


@contextmanager
def _telling_of_a_full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotEnoughSpace(f"{path}: no space left on the disk; free some or choose another --output") from error
        raise


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name when the block ends well and vanishes when it does not."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # without it a power cut can undo the rename
        finally:
            os.close(directory)
    finally:
        temporary.unlink(missing_ok=True)
