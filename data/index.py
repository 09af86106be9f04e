"""Where every sample of a shard lies: made once by reading headers, kept beside the tar, memory-mapped afterwards.

`shard-00000.tar.mmf.idx` is our own layout (never a pickle): 8 bytes of magic, the length of a JSON head, the head,
then plain little-endian arrays at 64-byte boundaries. It is derived data: it may be deleted at any time, is rebuilt
when the shard is no longer the one that it names, and where the folder cannot be written it is kept in memory. For
shards whose own folder is read-only, or is no folder at all, another one is named (`index_dir`).
"""

import hashlib
import json
import mmap
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.foreign_index import agrees, dali_samples, img2dataset_keys
from mmfoundry.data.grouping import Grouped, group
from mmfoundry.data.shard_names import Shard, ShardSpec, ShardUrl, as_shard, expand_shards
from mmfoundry.data.storage import ShardFile, Storage, user_cache
from mmfoundry.data.tar import BLOCK, Damage, TarMember, walk_tar
from mmfoundry.pipeline.errors import MissingInput, MmfoundryError

__all__ = [
    "INDEX_SUFFIX",
    "Member",
    "Shard",
    "ShardIndex",
    "ShardSpec",
    "drop_index",
    "expand_shards",
    "index_path",
    "index_shard",
    "open_index",
    "open_indexes",
    "require_samples",
    "save_index",
    "stored_index",
]

INDEX_SUFFIX = ".mmf.idx"
_MAGIC = b"MMFIDX02"
_ALIGN = 64
_MAX_HEAD_BYTES = 1 << 30
_DIGEST_BYTES = 4 << 20  # read at a time
_REMOTE_THREADS = 16
_PROBES = 8  # samples whose headers are looked at before an uploaded index is believed
# array name -> numpy types, of which the smallest that holds its values is used; starts have one entry more than there
# are samples
_ARRAYS = {
    "key_starts": ("<u4", "<u8"),
    "key_bytes": ("u1",),
    "member_starts": ("<u4", "<u8"),
    "extensions": ("u1", "<u2", "<u4"),
    "blocks": ("<u4", "<u8"),
    "sizes": ("<u4", "<u8"),
}


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a sample: extension in lower case without its dot, first byte in the shard, and bytes."""

    extension: str
    offset: int
    size: int


@dataclass(frozen=True)
class ShardIndex:
    """What lies where in one shard.

    Attributes:
        shard: the tar.
        shard_bytes: its size when indexed.
        identity: what changed when its bytes did, as `storage.ShardFile` has it: on a disk its time of change.
        digest: SHA-256 of the tar in hex, taken when it was written; empty where only headers were ever read.
        damage: what could not be read, in order of place.
        extensions: names of the extensions that occur, by number.
        arrays: the arrays of `_ARRAYS`, memory-mapped where the index came from a file.
    """

    shard: Shard
    shard_bytes: int
    identity: str
    digest: str
    damage: tuple[Damage, ...]
    extensions: tuple[str, ...]
    arrays: dict[str, np.ndarray] = field(repr=False)

    def __len__(self) -> int:
        return len(self.arrays["member_starts"]) - 1

    def key(self, number: int) -> str:
        """The key of sample `number` (0 <= number < len)."""
        start, end = self.arrays["key_starts"][number : number + 2]
        return self.arrays["key_bytes"][start:end].tobytes().decode("utf-8", "replace")

    def keys(self) -> Iterator[str]:
        """All keys, in the order of the shard."""
        return (self.key(number) for number in range(len(self)))

    def members(self, number: int) -> list[Member]:
        """The files of sample `number`, in the order of the shard.

        Raises:
            UnreadableSample: what the index says cannot be: its file was altered.
        """
        start, end = self.arrays["member_starts"][number : number + 2]
        part = slice(int(start), int(end))
        rows = (self.arrays[name][part].tolist() for name in ("extensions", "blocks", "sizes"))
        found, last = [], 0
        for kind, block, size in zip(*rows, strict=True):
            if kind >= len(self.extensions) or block * BLOCK < last or block * BLOCK + size > self.shard_bytes:
                raise UnreadableSample("damaged index", f"member at block {block}; delete the index, it is made again")
            found.append(Member(self.extensions[kind], block * BLOCK, size))
            last = block * BLOCK + size
        return found


def open_index(
    shard: str | os.PathLike[str],
    save: bool = True,
    index_dir: str | os.PathLike[str] | None = None,
    storage: Storage | None = None,
    digest: bool = False,
) -> ShardIndex:
    """The index of a shard: the stored one if it fits the shard, otherwise made by reading the shard's headers.

    An index that DALI's `wds2idx` left beside the shard, or that was uploaded with it, spares that reading where it
    fits. Samples that the old index of a shard that is now damaged knew, or that img2dataset's table names, and that
    are not there, are in `damage`.

    Args:
        shard: a tar, as a path or URL.
        save: keep a new index; where that cannot be done it is used from memory all the same.
        index_dir: folder for the index; by default the shard's own, or for URLs one in the user's cache.
        storage: how remote shards are read; by default with the default options.
        digest: where the index has no digest of the shard's content yet, read it whole and take one.
    Raises:
        MissingInput: no such shard.
        StorageError: the server of a remote shard does not give it.
    """
    place, folder = as_shard(shard), Path(index_dir) if index_dir is not None else None
    storage = storage or Storage()
    before = stored_index(place, folder)
    with storage.open(place) as file:
        fits = before is not None and (before.shard_bytes, before.identity) == (file.size, file.identity)
        if before is not None and fits and (before.digest or not digest):
            return before
        index = before if fits else None
        if before is None and isinstance(place, ShardUrl):
            index = _published_index(place, file, storage)
        if index is None:
            index = _compare(_index_of(place, file, before), before)
        if digest and not index.digest:
            index = replace(index, digest=_digest(file))
    if save:
        try:
            save_index(index, place, folder)
        except OSError:  # a read-only or full disk costs the next reader a second scan, nothing else
            return index
    return index


def open_indexes(
    shards: Sequence[Shard],
    save: bool = True,
    index_dir: str | os.PathLike[str] | None = None,
    storage: Storage | None = None,
) -> list[ShardIndex]:
    """`open_index` of many shards; remote ones side by side, as each waits for its store."""
    storage = storage or Storage()
    if not any(isinstance(shard, ShardUrl) for shard in shards):
        return [open_index(shard, save, index_dir, storage) for shard in shards]
    with ThreadPoolExecutor(_REMOTE_THREADS, thread_name_prefix="index") as threads:
        return list(threads.map(lambda shard: open_index(shard, save, index_dir, storage), shards))


def _compare(index: ShardIndex, before: ShardIndex | None) -> ShardIndex:
    """Keep what the last index knew of the same bytes, and name the samples that a shard now damaged had then."""
    if before is None:
        return index
    same_size = index.shard_bytes == before.shard_bytes
    if not index.digest and same_size:
        index = replace(index, digest=before.digest)  # the shard may only have been copied; `inspect.verify` tells
    now, then = {*index.keys()}, {*before.keys()}
    # zeros over whole headers and payloads look like nothing at all, but they do not change the size
    if index.damage or (same_size and now < then):
        known = now | {damage.name for damage in index.damage}
        gone = [Damage(index.shard_bytes, "gone since indexed", key) for key in sorted(then - known)]
        index = replace(index, damage=(*index.damage, *gone))
    return index


def index_shard(
    shard: Shard, digest: bool = False, before: ShardIndex | None = None, storage: Storage | None = None
) -> ShardIndex:
    """Read a shard's headers (with `digest`, its whole content) and group its members into samples.

    What is left out is in `damage`: see `tar.walk_tar` and `grouping.group`; and "named by img2dataset" for samples
    that its table has and the shard has not.

    Args:
        shard: a tar.
        digest: take the SHA-256 of the whole content.
        before: an index of the shard from better days; it tells which samples lack members.
        storage: how remote shards are read; by default with the default options.
    Raises:
        MissingInput: no such shard.
        StorageError: the server of a remote shard does not give it.
    """
    with (storage or Storage()).open(shard) as file:
        index = _from_headers(shard, file, before)
        return replace(index, digest=_digest(file)) if digest else index


def _index_of(shard: Shard, file: ShardFile, before: ShardIndex | None) -> ShardIndex:
    """By DALI's index where there is one that fits, otherwise from the headers."""
    if isinstance(shard, Path) and before is None:
        grouped = dali_samples(shard, file.read, file.size)
        if grouped is not None:
            return _from_columns(shard, file, grouped)
    return _from_headers(shard, file, before)


def _from_headers(shard: Shard, file: ShardFile, before: ShardIndex | None) -> ShardIndex:
    kinds = {} if before is None else _KindsByKey(before)
    same = before is not None and before.shard_bytes == file.size
    grouped = group(walk_tar(file.read, file.size), kinds, same)
    if isinstance(shard, Path):
        expected = img2dataset_keys(shard, len(grouped.keys))
        present = {*grouped.keys, *(damage.name for damage in grouped.damage)} if expected else set()
        for key in expected:
            if key not in present:
                grouped.note(Damage(file.size, "named by img2dataset", key))
    return _from_columns(shard, file, grouped)


class _KindsByKey(dict[str, frozenset[str]]):
    """The extensions of an old index's samples by key; looked up only where there is damage, so made only then."""

    def __init__(self, index: ShardIndex):
        super().__init__()
        self._index: ShardIndex | None = index

    def __contains__(self, key: object) -> bool:
        if self._index is not None:
            index, self._index = self._index, None
            names = index.extensions
            for number, known in enumerate(index.keys()):
                start, end = index.arrays["member_starts"][number : number + 2].tolist()
                kinds = index.arrays["extensions"][start:end].tolist()
                self[known] = frozenset(names[kind] for kind in kinds if kind < len(names))
        return super().__contains__(key)


def _from_columns(shard: Shard, file: ShardFile, grouped: Grouped) -> ShardIndex:
    keys = [key.encode("utf-8") for key in grouped.keys]
    columns: dict[str, Any] = {
        "key_starts": np.cumsum([0, *map(len, keys)], dtype="<u8"),
        "key_bytes": np.frombuffer(b"".join(keys), "u1"),
        "member_starts": np.asarray([0, *grouped.member_ends], "<u8"),
        "extensions": np.asarray(grouped.kinds, "<u4"),
        "blocks": np.asarray(grouped.blocks, "<u8"),
        "sizes": np.asarray(grouped.sizes, "<u8"),
    }
    arrays = {name: _smallest(column, _ARRAYS[name]) for name, column in columns.items()}
    return ShardIndex(shard, file.size, file.identity, "", tuple(grouped.damage), tuple(grouped.extensions), arrays)


def _smallest(column: np.ndarray, kinds: tuple[str, ...]) -> np.ndarray:
    """The column in the first type that holds its values."""
    top = int(column.max(initial=0))
    return column.astype(next(kind for kind in kinds if top <= np.iinfo(kind).max), copy=False)


def _digest(file: ShardFile) -> str:
    content = hashlib.sha256()
    for offset in range(0, file.size, _DIGEST_BYTES):
        content.update(file.read(offset, _DIGEST_BYTES))
    return content.hexdigest()


def save_index(index: ShardIndex, shard: Shard, index_dir: Path | None = None) -> Path:
    """Write the index to its place, whole or not at all; raises OSError where that cannot be done."""
    path = index_path(shard, index_dir)
    head: dict[str, Any] = {
        "shard_bytes": index.shard_bytes,
        "identity": index.identity,
        "samples": len(index),
        "digest": index.digest,
        "extensions": index.extensions,
        "damage": [asdict(damage) for damage in index.damage],
        "lengths": {name: len(array) for name, array in index.arrays.items()},
        "types": {name: array.dtype.str for name, array in index.arrays.items()},
    }
    encoded = json.dumps(head, ensure_ascii=True).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # ranks may share it
    try:
        with open(temporary, "wb") as file:
            file.write(_MAGIC + len(encoded).to_bytes(8, "little") + encoded)
            for name in _ARRAYS:
                file.write(bytes(-file.tell() % _ALIGN))
                file.write(index.arrays[name].data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def index_path(shard: Shard, index_dir: Path | None = None) -> Path:
    """Where a shard's index is kept: beside it, or in the folder that is named for indexes.

    Shards of several folders may share a name, so in a folder for indexes each has part of its place's digest, too.
    """
    if index_dir is None and isinstance(shard, Path):
        return shard.with_name(shard.name + INDEX_SUFFIX)
    # a signed URL has another query each day
    place = shard.partition("?")[0] if isinstance(shard, ShardUrl) else str(shard.resolve())
    digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:12]
    return (index_dir or user_cache() / "indexes") / f"{shard.name}.{digest}{INDEX_SUFFIX}"


def drop_index(shard: Shard) -> None:
    """Remove the index beside a shard, if there is one."""
    index_path(shard).unlink(missing_ok=True)


def stored_index(shard: Shard, index_dir: Path | None = None) -> ShardIndex | None:
    """The stored index whatever its age; None where there is none or it is not whole."""
    try:
        with open(index_path(shard, index_dir), "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # ValueError: an empty file
        return None
    return _parse(shard, data)


def _published_index(url: ShardUrl, shard: ShardFile, storage: Storage) -> ShardIndex | None:
    """The index that lies beside a remote shard, if somebody uploaded one and it fits.

    Its identity is that of the disk where it was made; headers spread over the shard must agree with it instead.
    """
    if "?" in url:  # a signature is for the shard alone
        return None
    try:
        with storage.open(ShardUrl(url + INDEX_SUFFIX)) as file:
            if file.size > shard.size // 2 + _DIGEST_BYTES:
                return None
            index = _parse(url, file.read(0, file.size))
    except MmfoundryError:
        return None
    if index is None or not len(index) or index.shard_bytes != shard.size:
        return None
    step = max(1, len(index) // _PROBES)
    try:
        members = [(index.key(number), index.members(number)) for number in range(0, len(index), step)]
    except UnreadableSample:
        return None
    probes = [
        TarMember(f"{key}.{member.extension}", member.offset, member.size) for key, found in members for member in found
    ]
    return replace(index, identity=shard.identity) if agrees(probes, shard.read) else None


def _parse(shard: Shard, data: mmap.mmap | bytes) -> ShardIndex | None:
    try:
        return _parse_index(shard, data)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError):
        return None


def _parse_index(shard: Shard, data: mmap.mmap | bytes) -> ShardIndex:
    """ValueError, KeyError or TypeError if the file is not an index that can be used."""
    if data[:8] != _MAGIC:
        raise ValueError("magic")
    length = int.from_bytes(data[8:16], "little")
    if length > min(len(data), _MAX_HEAD_BYTES):
        raise ValueError("head")
    position = 16 + length
    head = json.loads(data[16:position])
    arrays = {}
    for name, kinds in _ARRAYS.items():
        position += -position % _ALIGN
        kind = head["types"][name].replace("|", "")
        if kind not in kinds:
            raise ValueError("types")
        length = int(head["lengths"][name])
        if length < 0:
            raise ValueError("lengths")
        arrays[name] = np.frombuffer(data, dtype=kind, count=length, offset=position) if length else np.empty(0, kind)
        position += arrays[name].nbytes
    samples, members = int(head["samples"]), len(arrays["blocks"])
    if not (
        len(arrays["key_starts"]) == len(arrays["member_starts"]) == samples + 1
        and arrays["key_starts"][-1] == len(arrays["key_bytes"])
        and arrays["member_starts"][-1] == members == len(arrays["extensions"]) == len(arrays["sizes"])
    ):
        raise ValueError("lengths")
    return ShardIndex(
        shard,
        int(head["shard_bytes"]),
        str(head["identity"]),
        str(head["digest"]),
        tuple(Damage(int(row["offset"]), str(row["reason"]), str(row["name"])) for row in head["damage"]),
        tuple(map(str, head["extensions"])),
        arrays,
    )


def require_samples(indexes: Sequence[ShardIndex], name: str) -> None:
    """Refuse shards without a single readable sample, naming what was found instead."""
    if any(len(index) for index in indexes):
        return
    reasons = Counter(damage.reason for index in indexes for damage in index.damage)
    why = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common()) or "the tars are empty"
    raise MissingInput(f"{name}: no readable sample in {len(indexes)} shard(s): {why}")
