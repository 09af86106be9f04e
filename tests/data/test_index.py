"""Indexes: what they say, when they are rebuilt, and that damage costs what it hit and nothing else."""

import io
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mmfoundry.data.index import expand_shards, index_path, open_index, stored_index
from mmfoundry.data.reader import Pool, read_sample
from mmfoundry.data.shards import write_shards
from mmfoundry.data.tar import BLOCK
from mmfoundry.pipeline.errors import DamagedInput, MissingInput

Make = Callable[..., list[Path]]


def _members(shard: Path) -> dict[str, dict[str, bytes]]:
    index = open_index(shard, save=False)
    return {index.key(number): read_sample(index, number).members for number in range(len(index))}


def _reasons(shard: Path) -> list[str]:
    return [damage.reason for damage in open_index(shard, save=False).damage]


def _tar(path: Path, *members: tuple[tarfile.TarInfo | str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for info, data in members:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_an_index_finds_what_tarfile_finds(make_shards: Make) -> None:
    (shard,) = make_shards(5)
    with tarfile.open(shard) as tar:
        expected = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    found = {f"{key}.{kind}": data for key, members in _members(shard).items() for kind, data in members.items()}
    assert found == expected
    assert _reasons(shard) == []


def test_a_saved_index_says_what_a_new_one_says(make_shards: Make) -> None:
    (shard,) = make_shards(5)
    saved, made = stored_index(shard), open_index(shard)
    assert saved is not None
    assert list(saved.keys()) == list(made.keys())
    assert [saved.members(n) for n in range(5)] == [made.members(n) for n in range(5)]
    assert not saved.arrays["blocks"].flags.owndata  # it is the file, mapped


@pytest.mark.parametrize("change", ["time", "size", "cut index", "foreign index", "no index"])
def test_a_stale_or_broken_index_is_rebuilt(make_shards: Make, change: str) -> None:
    (shard,) = make_shards(5)
    path = index_path(shard)
    whole = path.read_bytes()
    if change == "time":
        os.utime(shard, ns=(1, 1))
    elif change == "size":
        shard.write_bytes(make_shards(3)[0].read_bytes())
    elif change == "cut index":
        path.write_bytes(whole[: len(whole) // 2])
    elif change == "foreign index":
        path.write_bytes(b"\x80\x04not ours")
    else:
        path.unlink()
    expected = 3 if change == "size" else 5
    assert len(open_index(shard)) == expected
    stored = stored_index(shard)
    assert stored is not None
    assert (len(stored), stored.identity) == (expected, str(shard.stat().st_mtime_ns))


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_no_bytes_of_an_index_can_do_harm(make_shards: Make, cut: int) -> None:
    (shard,) = make_shards(5)
    path = index_path(shard)
    noise = random.Random(cut)
    data = bytearray(path.read_bytes())
    for _ in range(8):
        data[noise.randrange(len(data))] = noise.randrange(256)
    path.write_bytes(data)
    index = open_index(shard)
    for number in range(len(index)):
        try:
            read_sample(index, number)
        except (DamagedInput, UnicodeDecodeError, IndexError):
            continue


def test_a_folder_that_cannot_be_written_is_read_all_the_same(
    make_shards: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shard,) = make_shards(5)
    index_path(shard).unlink()

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("mmfoundry.data.index.save_index", refuse)  # chmod does not stop root
    assert len(open_index(shard)) == 5
    assert not index_path(shard).exists()


def test_what_users_write_for_shards(make_shards: Make, tmp_path: Path) -> None:
    shards = make_shards(30)
    folder = shards[0].parent
    assert expand_shards(folder) == expand_shards(folder.parent) == expand_shards(f"{folder}/*.tar") == shards
    assert expand_shards(f"{folder}/shard-{{00001..00002}}.tar") == shards[1:]
    assert expand_shards([shards[1], folder]) == [shards[1], shards[0], shards[2]]
    with pytest.raises(MissingInput, match="no such shard"):
        expand_shards(folder / "other.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInput, match=r"no \*\.tar"):
        expand_shards(tmp_path / "empty")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(DamagedInput, match="compressed"):
        expand_shards(tmp_path / "a.tar.gz")
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(MissingInput, match="no readable sample"):
        Pool(tmp_path / "empty.tar")


@pytest.mark.parametrize("member", ["json", "png", "txt"])
def test_a_damaged_header_costs_one_sample(make_shards: Make, member: str) -> None:
    (shard,) = make_shards(9)
    whole = _members(shard)
    place = next(m for m in open_index(shard).members(4) if m.extension == member)
    data = bytearray(shard.read_bytes())
    data[place.offset - BLOCK + 3] ^= 0x10
    shard.write_bytes(data)
    assert _members(shard) == {key: members for key, members in whole.items() if key != "000004"}
    damage = open_index(shard).damage
    assert ("damaged header", place.offset - BLOCK) in [(d.reason, d.offset) for d in damage]
    assert "000004" in [d.name for d in damage]


def test_long_names_old_and_new(tmp_path: Path) -> None:
    key = "folder/" + "ä" * 90
    for number, kind in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        shard = _tar(tmp_path / f"{number}.tar", (f"{key}.txt", b"one"), ("./b.TXT", b"two"), kind=kind)
        assert _members(shard) == {key: {"txt": b"one"}, "b": {"txt": b"two"}}
        assert _reasons(shard) == []


def test_what_is_no_plain_member_is_refused(tmp_path: Path) -> None:
    sparse = tarfile.TarInfo("sparse.txt")
    sparse.pax_headers = {"GNU.sparse.major": "1"}
    shard = _tar(
        tmp_path / "a.tar",
        ("a.txt", b"kept"),
        ("../../etc/b.txt", b"x"),
        ("/c.txt", b"x"),
        (_special("d.txt", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (_special("e.txt", tarfile.LNKTYPE, "a.txt"), b""),
        (_special("f.txt", tarfile.CHRTYPE), b""),
        (_special("g.txt", tarfile.FIFOTYPE), b""),
        (_special("folder", tarfile.DIRTYPE), b""),
        (sparse, b"x"),
        ("README", b"x"),
        ("h\n.txt", b"x"),
        ("i.txt", b"kept"),
        ("i.txt", b"again"),
        ("a.txt", b"again"),
    )
    assert _members(shard) == {"a": {"txt": b"kept"}, "i": {"txt": b"kept"}}
    assert _reasons(shard) == [
        *("unsafe path", "unsafe path", "link", "link", "device", "device", "sparse member"),
        *("no extension", "unsafe path", "duplicate member", "duplicate key"),
    ]


def test_tars_put_end_to_end_are_one(make_shards: Make) -> None:
    one, two = make_shards(6, per_shard=3)
    expected = _members(one) | _members(two)
    one.write_bytes(one.read_bytes() + two.read_bytes())
    assert _members(one) == expected
    assert _reasons(one) == []


def test_a_shard_that_lost_its_end_names_what_it_had(make_shards: Make) -> None:
    (shard,) = make_shards(9)
    index = open_index(shard)
    cut = index.members(6)[0].offset - BLOCK  # between two samples: no header is hurt
    shard.write_bytes(shard.read_bytes()[:cut])
    now = open_index(shard)
    assert list(now.keys()) == [f"{n:06d}" for n in range(6)]
    assert [(d.reason, d.name) for d in now.damage] == [
        ("cut off", ""),
        *(("gone since indexed", f"{n:06d}") for n in (6, 7, 8)),
    ]
    assert [d.reason for d in open_index(shard).damage].count("gone since indexed") == 3  # it is not forgotten


def _corrupt(data: bytes, noise: random.Random) -> tuple[bytes, list[tuple[int, int]]]:
    """Damaged bytes, and the ranges of the original that were touched."""
    size, kind = len(data), noise.choice(["flip", "flip header", "zero", "cut", "junk", "overwrite"])
    out, touched = bytearray(data), []
    if kind == "cut":
        cut = noise.randrange(size)
        return data[:cut], [(cut, size)]
    if kind == "junk":
        return data + noise.randbytes(noise.randrange(1, 3000)), []
    for _ in range(noise.randint(1, 4)):
        start = noise.randrange(size)
        if kind == "flip header":
            start = noise.choice([at for at in range(0, size, BLOCK) if data[at + 257 : at + 262] == b"ustar"])
            start += noise.randrange(345)
        length = 1 if kind.startswith("flip") else min(noise.choice([100, BLOCK, 3 * BLOCK]), size - start)
        if kind == "zero":
            out[start : start + length] = bytes(length)
        elif kind == "overwrite":
            out[start : start + length] = noise.randbytes(length)
        else:
            out[start] ^= 1 << noise.randrange(8)
        touched.append((start, start + length))
    return bytes(out), touched


@pytest.mark.parametrize("seed", range(60))
def test_every_undamaged_sample_is_read(tmp_path: Path, seed: int) -> None:
    noise = random.Random(seed)
    rows = [
        {"__key__": f"{n:06d}", "bin": noise.randbytes(noise.randrange(2000)), "txt": f"text {n}"} for n in range(12)
    ]
    (shard,) = write_shards(rows, tmp_path)
    index = open_index(shard)
    whole = _members(shard)
    spans = {}
    for number in range(len(index)):
        members = index.members(number)
        spans[index.key(number)] = (members[0].offset - BLOCK, members[-1].offset + members[-1].size)
    damaged, touched = _corrupt(shard.read_bytes(), noise)
    shard.write_bytes(damaged)
    found = _members(shard)
    unhurt = {key for key, (start, end) in spans.items() if not any(start < stop and at < end for at, stop in touched)}
    assert {key: found.get(key) for key in unhurt} == {key: whole[key] for key in unhurt}
    assert set(found) <= set(whole)
    lost = set(whole) - set(found)
    damage = open_index(shard).damage
    assert lost <= {d.name.removesuffix(".bin").removesuffix(".txt") for d in damage}
