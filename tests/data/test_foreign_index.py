"""What DALI and img2dataset leave beside a shard is used where it fits, and nowhere else."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from mmfoundry.data.foreign_index import dali_samples
from mmfoundry.data.index import ShardIndex, drop_index, index_path, open_index
from mmfoundry.data.shard_names import as_shard
from mmfoundry.data.storage import ShardFile, Storage
from mmfoundry.data.tar import BLOCK

Make = Callable[..., list[Path]]


def _dali(shard: Path, index: ShardIndex, version: str = "v1.2") -> Path:
    """What `wds2idx` 1.2 writes: extension, offset, size and name of each member, a line a sample."""
    lines = [
        " ".join(f"{m.extension} {m.offset} {m.size} {index.key(n)}.{m.extension}" for m in index.members(n))
        for n in range(len(index))
    ]
    path = shard.with_suffix(".idx")
    path.write_text("\n".join([f"{version} {len(lines)}", *lines, ""]))
    return path


@pytest.fixture
def shard(make_shards: Make) -> Path:
    return make_shards(9)[0]


def _used(shard: Path) -> bool:
    """Whether DALI's index was believed: headers that it does not probe are not read then."""
    drop_index(shard)
    with open(shard, "rb") as file:
        return dali_samples(shard, lambda at, n: os.pread(file.fileno(), n, at), shard.stat().st_size) is not None


def test_dali_index_says_what_ours_says(shard: Path) -> None:
    ours = open_index(shard)
    _dali(shard, ours)
    assert _used(shard)
    theirs = open_index(shard)
    assert [*theirs.keys()] == [*ours.keys()]
    assert [theirs.members(n) for n in range(9)] == [ours.members(n) for n in range(9)]
    assert theirs.damage == ()


@pytest.mark.parametrize(
    "wrong", ["version", "older", "count", "offset", "size", "name", "cut", "binary", "shorter", "climbs", "number"]
)
def test_a_dali_index_that_does_not_fit_is_not_used(shard: Path, wrong: str) -> None:
    ours = open_index(shard)
    path = _dali(shard, ours, "v1.1" if wrong == "version" else "v1.2")
    text = path.read_text()
    first, last = ours.members(0)[0], ours.members(8)[-1]
    changes = {
        "count": ("v1.2 9", "v1.2 8"),
        "offset": (f" {first.offset} ", f" {first.offset + BLOCK} "),
        "size": (f" {last.size} 000008.txt", f" {last.size + 1} 000008.txt"),
        "name": ("000000.json", "000009.json"),
        "climbs": ("000000.json", "../../../0.json"),
        "number": (f" {first.offset} ", " -1 "),
        "cut": (text[len(text) // 2 :], ""),
    }
    if wrong in changes:
        assert changes[wrong][0] in text
        path.write_text(text.replace(*changes[wrong]))
    elif wrong == "binary":
        path.write_bytes(b"\xff\xfe" * 100)
    elif wrong == "shorter":  # of a shard that lost its last sample: its end marker is not where it says
        lines = text.splitlines()
        path.write_text("\n".join(["v1.2 8", *lines[1:-1], ""]))
    elif wrong == "older":
        os.utime(path, ns=(1, 1))
    assert not _used(shard)
    assert [*open_index(shard).keys()] == [*ours.keys()]


def _img2dataset(shard: Path, keys: list[str], failed: list[str]) -> None:
    status = ["success"] * len(keys) + ["failed_to_download"] * len(failed)
    pl.DataFrame({"key": [*keys, *failed], "status": status, "url": "x"}).write_parquet(shard.with_suffix(".parquet"))
    stats = {"count": len(status), "successes": len(keys)}
    shard.with_name(f"{shard.stem}_stats.json").write_text(json.dumps(stats))


def test_img2dataset_names_what_a_damaged_shard_lost(shard: Path) -> None:
    index = open_index(shard)
    keys = [*index.keys()]
    _img2dataset(shard, keys, ["000099"])
    drop_index(shard)
    assert open_index(shard).damage == ()
    start, end = (index.members(number)[0].offset - BLOCK for number in (2, 4))
    data = shard.read_bytes()
    shard.write_bytes(data[:start] + bytes(end - start) + data[end:])
    drop_index(shard)
    named = [damage.name for damage in open_index(shard).damage if damage.reason == "named by img2dataset"]
    assert named == ["000002", "000003"]


@pytest.mark.parametrize("table", ["none", "broken", "other columns", "no count"])
def test_tables_of_something_else_say_nothing(shard: Path, table: str) -> None:
    path = shard.with_suffix(".parquet")
    if table == "broken":
        path.write_bytes(b"PAR1 not really")
    elif table == "other columns":
        pl.DataFrame({"a": [1]}).write_parquet(path)
    elif table == "no count":
        _img2dataset(shard, [f"{n:06d}" for n in range(9)], [])
        shard.with_name(f"{shard.stem}_stats.json").write_text("[" * 100_000)
    drop_index(shard)
    index = open_index(shard)
    assert (len(index), index.damage) == (9, ())


class _Server(Storage):
    """A folder as a server would give it; counts the bytes that are asked for."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.asked = folder, 0

    def open(self, shard: str | os.PathLike[str]) -> ShardFile:
        file = super().open(self.folder / as_shard(shard).name)
        file.identity = "etag"
        read = file.read

        def counted(offset: int, count: int) -> bytes:
            self.asked += count
            return read(offset, count)

        file.read = counted  # type: ignore[method-assign]
        return file


def test_an_index_uploaded_with_its_shard_is_used(make_shards: Make, tmp_path: Path) -> None:
    (shard,) = make_shards(200, per_shard=200)
    url, server, indexes = f"s3://bucket/{shard.name}", _Server(shard.parent), tmp_path / "indexes"
    ours = open_index(shard)
    index = open_index(url, index_dir=indexes, storage=server)
    assert ([*index.keys()], index.identity, index.digest) == ([*ours.keys()], "etag", ours.digest)
    headers = 600 * BLOCK
    assert server.asked - index_path(shard).stat().st_size < headers / 10
    server.asked = 0
    open_index(url, index_dir=indexes, storage=server)
    assert server.asked == 0, "it was kept"


@pytest.mark.parametrize("wrong", ["no index", "another shard's", "broken", "of other members"])
def test_an_uploaded_index_that_does_not_fit_is_not_used(make_shards: Make, tmp_path: Path, wrong: str) -> None:
    (shard,) = make_shards(20, per_shard=20)
    expected = [*open_index(shard).keys()]
    if wrong == "no index":
        drop_index(shard)
    elif wrong == "another shard's":
        (other,) = make_shards(19, per_shard=20)
        index_path(shard).write_bytes(index_path(other).read_bytes())
    elif wrong == "broken":
        index_path(shard).write_bytes(b"MMFIDX02")
    else:  # as long as the shard, with other places
        (other,) = make_shards(20, per_shard=20, first=20)
        data = other.read_bytes()
        assert len(data) == shard.stat().st_size
        index_path(shard).write_bytes(index_path(other).read_bytes())
    index = open_index(f"s3://bucket/{shard.name}", index_dir=tmp_path / "indexes", storage=_Server(shard.parent))
    assert [*index.keys()] == expected
