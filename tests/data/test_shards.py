"""write_shards: webdataset reads it, equal samples give equal bytes, a shard is whole or absent."""

import errno
import tarfile
from pathlib import Path

import pytest

from mmfoundry.data.index import index_path, open_index
from mmfoundry.data.shards import write_shard, write_shards
from mmfoundry.pipeline.errors import NotEnoughSpace


def _rows(count: int, size: int = 700) -> list[dict]:
    return [{"__key__": f"{n:06d}", "json": {"b": n, "a": "é"}, "bin": bytes([n % 256]) * size} for n in range(count)]


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    first = write_shards(_rows(7), tmp_path / "a", max_count=3)
    again = write_shards(({**dict(reversed(row.items()))} for row in _rows(7)), tmp_path / "b", max_count=3)
    assert [path.name for path in first] == ["shard-00000.tar", "shard-00001.tar", "shard-00002.tar"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


def test_a_plain_tar_reader_and_webdataset_see_the_samples(tmp_path: Path) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    (shard,) = write_shards(_rows(3), tmp_path)
    with tarfile.open(shard) as tar:
        assert tar.getnames() == [f"{n:06d}.{kind}" for n in range(3) for kind in ("bin", "json")]
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in tar} == {(0, 0, 0, "")}
    with shard.open("rb") as stream:
        found = list(group_by_keys(tar_file_expander([{"url": str(shard), "stream": stream}])))
    assert [row["__key__"] for row in found] == ["000000", "000001", "000002"]
    assert found[2]["json"] == '{"a": "é", "b": 2}'.encode()


def test_a_shard_keeps_its_limits(tmp_path: Path) -> None:
    shards = write_shards(_rows(9), tmp_path, max_bytes=8 << 10)
    assert [len(open_index(shard)) for shard in shards] == [3, 3, 3]  # 2,560 bytes a sample
    assert all(shard.stat().st_size <= (8 << 10) + 10240 for shard in shards)  # a tar ends in a whole 10 KiB record
    large = write_shards(_rows(2, size=20_000), tmp_path / "large", max_bytes=8 << 10)
    assert [len(open_index(shard)) for shard in large] == [1, 1]


def test_a_failure_leaves_whole_shards_only(tmp_path: Path) -> None:
    def broken():
        yield from _rows(5)
        raise RuntimeError("the source fails")

    with pytest.raises(RuntimeError, match="the source fails"):
        write_shards(broken(), tmp_path, max_count=2)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".tar") == [
        "shard-00000.tar",
        "shard-00001.tar",
    ]
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_shorter_run_removes_what_a_longer_one_left(tmp_path: Path) -> None:
    long = write_shards(_rows(6), tmp_path, max_count=2)
    short = write_shards(_rows(2), tmp_path, max_count=2)
    assert short == long[:1]
    assert sorted(tmp_path.iterdir()) == sorted([short[0], index_path(short[0])])


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        ({"txt": "a"}, "__key__"),
        ({"__key__": "a.b", "txt": "a"}, "no dot"),
        ({"__key__": "../a", "txt": "a"}, r"'\.\.'"),
        ({"__key__": "/a", "txt": "a"}, "no empty part"),
        ({"__key__": "a", "txt": 3}, "int"),
        ({"__key__": "a", "Txt": "a"}, "lower case"),
        ({"__key__": "a", "_note": "a"}, "no members"),
    ],
)
def test_what_could_not_be_read_back_is_refused(tmp_path: Path, sample: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        write_shards([sample], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_repeated_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'000001' comes twice"):
        write_shard(tmp_path / "a.tar", _rows(2)[1:] * 2)
    assert not (tmp_path / "a.tar").exists()


def test_the_index_knows_the_digest(tmp_path: Path) -> None:
    import hashlib

    (shard,) = write_shards(_rows(3), tmp_path)
    assert open_index(shard).digest == hashlib.sha256(shard.read_bytes()).hexdigest()


@pytest.mark.parametrize("what", ["shard", "index"])
def test_a_full_disk_is_one_line_and_leaves_whole_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_shards(_rows(2), tmp_path, max_count=2)
    target = "mmfoundry.data.shards.os.fsync" if what == "shard" else "mmfoundry.data.shards.save_index"
    monkeypatch.setattr(target, full)
    with pytest.raises(NotEnoughSpace, match=r"shard-00000\.tar: no space left"):
        write_shards(_rows(4), tmp_path, max_count=4)
    monkeypatch.undo()
    assert len(open_index(tmp_path / "shard-00000.tar")) == (2 if what == "shard" else 4)
    assert not list(tmp_path.glob(".*"))
