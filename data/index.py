"""Where every sample of a shard lies: made once by reading headers, kept beside the tar, memory-mapped afterwards.

`shard-00000.tar.mmf.idx` is our own layout (never a pickle): 8 bytes of magic, the length of a JSON head, the head,
then plain little-endian arrays at 64-byte boundaries. It is derived data: it may be deleted at any time, is rebuilt
when the shard's size or time differ from those it names, and where the folder cannot be written it is kept in memory.
"""

import glob
import hashlib
import json
import mmap
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmfoundry.data.tar import BLOCK, Damage, TarMember, walk_tar
from mmfoundry.pipeline.errors import DamagedInput, MissingInput

INDEX_SUFFIX = ".mmf.idx"
_MAGIC = b"MMFIDX01"
_ALIGN = 64
# array name -> numpy type; starts have one entry more than there are samples
_ARRAYS = {
    "key_starts": "<u4",
    "key_bytes": "u1",
    "member_starts": "<u4",
    "extensions": "<u2",
    "blocks": "<u4",
    "sizes": "<u8",
}
_KEY = re.compile(
    r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL
)  # webdataset's rule: the extension starts at the first dot
_UNSAFE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # controls, and bytes that were not UTF-8

_HOLES = ("damaged header", "cut off", "damaged long name")  # damage that hides how many members it cost

ShardSpec = str | os.PathLike[str] | Sequence["str | os.PathLike[str]"]


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
        shard_mtime_ns: its time of change when indexed.
        digest: SHA-256 of the tar in hex, taken when it was written; empty where only headers were ever read.
        damage: what could not be read, in order of place.
        extensions: names of the extensions that occur, by number.
        arrays: the arrays of `_ARRAYS`, memory-mapped where the index came from a file.
    """

    shard: Path
    shard_bytes: int
    shard_mtime_ns: int
    digest: str
    damage: tuple[Damage, ...]
    extensions: tuple[str, ...]
    arrays: dict[str, np.ndarray] = field(repr=False)

    def __len__(self) -> int:
        return len(self.arrays["member_starts"]) - 1

    def key(self, number: int) -> str:
        """The key of sample `number` (0 <= number < len)."""
        start, end = self.arrays["key_starts"][number : number + 2]
        return self.arrays["key_bytes"][start:end].tobytes().decode("utf-8")

    def keys(self) -> Iterator[str]:
        """All keys, in the order of the shard."""
        return (self.key(number) for number in range(len(self)))

    def members(self, number: int) -> list[Member]:
        """The files of sample `number`, in the order of the shard."""
        start, end = self.arrays["member_starts"][number : number + 2]
        part = slice(int(start), int(end))
        rows = (self.arrays[name][part].tolist() for name in ("extensions", "blocks", "sizes"))
        return [Member(self.extensions[kind], block * BLOCK, size) for kind, block, size in zip(*rows, strict=True)]


def expand_shards(shards: ShardSpec) -> list[Path]:
    """Turn what a user may write for shards into the list of tars.

    Args:
        shards: a tar, a folder (every `*.tar` in it or, if it has none, below it), a glob, a brace range such as
            `shard-{00000..00009}.tar`, or a list of these.
    Returns:
        Paths, sorted within each item of a list, each once.
    Raises:
        MissingInput: nothing there, or no tar in it.
        DamagedInput: a compressed tar, which cannot be indexed.
    """
    if not isinstance(shards, str | os.PathLike):
        found = [path for item in shards for path in expand_shards(item)]
        if not found:
            raise MissingInput("no shards: the list is empty")
        return list(dict.fromkeys(found))
    text = os.fspath(shards)
    path = Path(text)
    if path.is_dir():
        found = sorted(path.glob("*.tar")) or sorted(path.rglob("*.tar"))
        found = [tar for tar in found if not tar.name.startswith(".")]
        if not found:
            raise MissingInput(f"{text}: no *.tar in this folder")
        return found
    if path.exists():
        if path.name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
            raise DamagedInput(f"{text}: a compressed tar has no places to index; unpack it to a plain .tar")
        return [path]
    if "{" in text:
        from braceexpand import braceexpand  # webdataset's own

        return expand_shards(list(braceexpand(text)))
    if glob.has_magic(text):
        found = sorted(Path(name) for name in glob.glob(text, recursive=True) if not name.endswith(INDEX_SUFFIX))
        if found:
            return [tar for item in found for tar in expand_shards(item)]
    raise MissingInput(f"{text}: no such shard; give a .tar, a folder of them, or a pattern such as 'data/*.tar'")


def open_index(shard: str | os.PathLike[str], save: bool = True) -> ShardIndex:
    """The index of a shard: from beside it if it fits the shard, otherwise made by reading the shard's headers.

    Where the old index of a shard that is now damaged knew more samples, those are in `damage` as "gone since indexed".

    Args:
        shard: a tar on a local disk.
        save: keep a new index beside the shard; where that cannot be written it is used from memory all the same.
    Raises:
        MissingInput: no such shard.
    """
    path = Path(shard)
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise MissingInput(f"{path}: no such shard") from error
    index = stored_index(path)
    if index is not None and (index.shard_bytes, index.shard_mtime_ns) == (status.st_size, status.st_mtime_ns):
        return index
    index = _compare(index_shard(path), index)
    if save:
        try:
            save_index(index, path)
        except OSError:  # a read-only or full disk costs the next reader a second scan, nothing else
            return index
    return index


def _compare(index: ShardIndex, before: ShardIndex | None) -> ShardIndex:
    """Keep what the last index knew of the same bytes, and name the samples that a shard now damaged had then."""
    if before is None:
        return index
    if not index.digest and index.shard_bytes == before.shard_bytes:
        index = replace(index, digest=before.digest)  # the shard may only have been copied; `inspect.verify` tells
    if index.damage:
        known = {*index.keys(), *(damage.name for damage in index.damage)}
        gone = [Damage(index.shard_bytes, "gone since indexed", key) for key in sorted({*before.keys()} - known)]
        index = replace(index, damage=(*index.damage, *gone))
    return index


def index_shard(shard: Path, digest: bool = False) -> ShardIndex:
    """Read a shard's headers (with `digest`, its whole content) and group its members into samples.

    Members are grouped as webdataset does: neighbours with the same path up to the first dot of the last part. What is
    left out is in `damage`: besides what `tar.walk_tar` reports, "unsafe path", "no extension", "duplicate member",
    "duplicate key", and "incomplete sample": one that borders on damage and has a set of extensions that no sample
    away from damage has.
    """
    with open(shard, "rb") as file:
        status = os.fstat(file.fileno())
        descriptor = file.fileno()
        grouped = _group(walk_tar(lambda offset, count: os.pread(descriptor, count, offset), status.st_size))
        sha256 = hashlib.file_digest(file, "sha256").hexdigest() if digest else ""
    names = sorted({extension for _, members in grouped.samples for extension, _, _ in members})
    numbers = {name: number for number, name in enumerate(names)}
    keys = [key.encode("utf-8") for key, _ in grouped.samples]
    flat = [member for _, members in grouped.samples for member in members]
    columns: dict[str, Any] = {
        "key_starts": np.cumsum([0, *map(len, keys)]),
        "key_bytes": np.frombuffer(b"".join(keys), "u1"),
        "member_starts": np.cumsum([0, *(len(members) for _, members in grouped.samples)]),
        "extensions": [numbers[extension] for extension, _, _ in flat],
        "blocks": [offset // BLOCK for _, offset, _ in flat],
        "sizes": [size for _, _, size in flat],
    }
    arrays = {name: np.asarray(column, dtype=_ARRAYS[name]) for name, column in columns.items()}
    return ShardIndex(shard, status.st_size, status.st_mtime_ns, sha256, tuple(grouped.damage), tuple(names), arrays)


def save_index(index: ShardIndex, shard: Path) -> Path:
    """Write the index beside `shard`, whole or not at all; raises OSError where that cannot be done."""
    path = index_path(shard)
    head: dict[str, Any] = {
        "shard_bytes": index.shard_bytes,
        "shard_mtime_ns": index.shard_mtime_ns,
        "samples": len(index),
        "digest": index.digest,
        "extensions": index.extensions,
        "damage": [asdict(damage) for damage in index.damage],
        "lengths": {name: len(array) for name, array in index.arrays.items()},
    }
    encoded = json.dumps(head, ensure_ascii=True).encode()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # ranks may share it
    try:
        with open(temporary, "wb") as file:
            file.write(_MAGIC + len(encoded).to_bytes(8, "little") + encoded)
            for name in _ARRAYS:
                file.write(bytes(-file.tell() % _ALIGN))
                file.write(index.arrays[name].tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def index_path(shard: Path) -> Path:
    """Where a shard's index is kept."""
    return shard.with_name(shard.name + INDEX_SUFFIX)


def drop_index(shard: Path) -> None:
    """Remove the index beside a shard, if there is one."""
    index_path(shard).unlink(missing_ok=True)


def stored_index(shard: Path) -> ShardIndex | None:
    """The index beside `shard` whatever its age; None where there is none or it is not whole."""
    try:
        with open(index_path(shard), "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # ValueError: an empty file
        return None
    try:
        return _parse_index(shard, data)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError):
        return None


def _parse_index(shard: Path, data: mmap.mmap) -> ShardIndex:
    """ValueError, KeyError or TypeError if the file is not an index that can be used."""
    if data[:8] != _MAGIC:
        raise ValueError("magic")
    position = 16 + int.from_bytes(data[8:16], "little")
    head = json.loads(data[16:position])
    arrays = {}
    for name, kind in _ARRAYS.items():
        position += -position % _ALIGN
        length = int(head["lengths"][name])
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
        int(head["shard_mtime_ns"]),
        str(head["digest"]),
        tuple(Damage(int(row["offset"]), str(row["reason"]), str(row["name"])) for row in head["damage"]),
        tuple(map(str, head["extensions"])),
        arrays,
    )


@dataclass(slots=True)
class _Grouped:
    samples: list[tuple[str, list[tuple[str, int, int]]]] = field(
        default_factory=list
    )  # key, (extension, offset, size)
    damage: list[Damage] = field(default_factory=list)


def _group(found: Iterable[TarMember | Damage]) -> _Grouped:
    grouped = _Grouped()
    borders: set[int] = set()  # numbers of samples with damage inside or next to them
    seen: set[str] = set()
    beside_damage = False
    for item in found:
        if isinstance(item, Damage):
            grouped.damage.append(item)
            if item.reason not in _HOLES:
                continue
            if grouped.samples:
                borders.add(len(grouped.samples) - 1)
            beside_damage = True
            continue
        name = _split_path(item.path)
        if name is None:
            continue
        if isinstance(name, str):
            grouped.damage.append(Damage(item.offset - BLOCK, name, _printable(item.path)))
            continue
        key, extension = name
        if not grouped.samples or grouped.samples[-1][0] != key:
            if key in seen:
                grouped.damage.append(Damage(item.offset - BLOCK, "duplicate key", _printable(item.path)))
                continue
            seen.add(key)
            grouped.samples.append((key, []))
            if beside_damage:
                borders.add(len(grouped.samples) - 1)
        beside_damage = False
        members = grouped.samples[-1][1]
        if any(extension == other for other, _, _ in members):
            grouped.damage.append(Damage(item.offset - BLOCK, "duplicate member", _printable(item.path)))
            continue
        members.append((extension, item.offset, item.size))
    _drop_incomplete(grouped, borders)
    return grouped


def _drop_incomplete(grouped: _Grouped, borders: set[int]) -> None:
    def kinds(number: int) -> frozenset[str]:
        return frozenset(extension for extension, _, _ in grouped.samples[number][1])

    if not borders:
        return
    usual = Counter(kinds(number) for number in range(len(grouped.samples)) if number not in borders)
    lost = [number for number in sorted(borders) if kinds(number) not in usual]
    for number in lost:
        key, members = grouped.samples[number]
        grouped.damage.append(Damage(members[0][1] - BLOCK, "incomplete sample", key))
    grouped.samples = [sample for number, sample in enumerate(grouped.samples) if number not in set(lost)]
    grouped.damage.sort(key=lambda damage: damage.offset)


def _split_path(path: str) -> tuple[str, str] | str | None:
    """Key and extension of a member; or the reason why it is refused; or None: it is passed over."""
    while path.startswith("./"):
        path = path[2:]
    name = path.rpartition("/")[2]
    if name.startswith("__") and name.endswith("__"):  # webdataset's own notes
        return None
    if path.startswith("/") or ".." in path.split("/") or _UNSAFE.search(path):
        return "unsafe path"
    match = _KEY.fullmatch(path)
    return (match[1], match[2].lower()) if match else "no extension"


def _printable(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def require_samples(indexes: Sequence[ShardIndex], name: str) -> None:
    """Refuse shards without a single readable sample, naming what was found instead."""
    if any(len(index) for index in indexes):
        return
    reasons = Counter(damage.reason for index in indexes for damage in index.damage)
    why = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common()) or "the tars are empty"
    raise MissingInput(f"{name}: no readable sample in {len(indexes)} shard(s): {why}")
