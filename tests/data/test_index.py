"""Indexes: what they say, when they are rebuilt, and that damage costs what it hit and nothing else."""

import bz2
import gzip
import io
import lzma
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.grouping import MAX_LISTED_DAMAGE, group
from mmfoundry.data.index import drop_index, expand_shards, index_path, open_index, stored_index
from mmfoundry.data.reader import Pool, read_sample
from mmfoundry.data.shard_names import shown
from mmfoundry.data.shards import write_shards
from mmfoundry.data.tar import BLOCK, Damage
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput

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


@pytest.mark.parametrize("seed", range(40))
def test_no_bytes_of_an_index_can_do_harm(make_shards: Make, seed: int) -> None:
    """It is refused and made again, or what it gives is bytes of this shard, of the size that it says."""
    (shard,) = make_shards(5)
    whole, content, path = _members(shard), shard.read_bytes(), index_path(shard)
    noise = random.Random(seed)
    data = bytearray(path.read_bytes())
    for _ in range(8):
        data[noise.randrange(len(data))] = noise.randrange(256)
    path.write_bytes(data)
    believed = stored_index(shard) is not None
    index = open_index(shard)
    found = {}
    for number in range(len(index)):
        try:
            raw = read_sample(index, number)
        except UnreadableSample as error:
            assert error.reason == "damaged index"  # noqa: PT017 - most numbers raise nothing
            continue
        members = index.members(number)
        assert all(content[each.offset : each.offset + each.size] == raw.members[each.extension] for each in members)
        found[raw.key] = raw.members
    if not believed:
        assert found == whole
    assert open_index(shard).shard_bytes == len(content)
    drop_index(shard)
    assert _members(shard) == whole  # nothing but the index was hurt


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


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar.zst"])
def test_compressed_shards_in_a_folder_are_not_passed_over(make_shards: Make, suffix: str) -> None:
    shards = make_shards(30)
    twin = shards[0].with_name(f"{shards[0].stem}{suffix}")
    twin.write_bytes(b"")
    assert expand_shards(twin.parent) == shards, "unpacked beside"
    twin.rename(twin.with_name(f"shard-00009{suffix}"))
    with pytest.raises(DamagedInput, match=rf"shard-00009\{suffix}: a compressed tar"):
        expand_shards(twin.parent)
    for shard in shards:
        shard.unlink()
    with pytest.raises(DamagedInput, match="data convert"):
        expand_shards(twin.parent)


@pytest.mark.parametrize("squeeze", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_tar_under_a_plain_name_is_told(make_shards: Make, squeeze: Callable[[bytes], bytes]) -> None:
    (shard,) = make_shards(9)
    shard.write_bytes(squeeze(shard.read_bytes()))
    with pytest.raises(MissingInput, match=r"no readable sample in 1 shard.*: .*1 x compressed$"):
        Pool(shard)


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


def test_zeros_over_whole_samples_are_no_end_of_the_tar(make_shards: Make) -> None:
    (shard,) = make_shards(9)
    index = open_index(shard)
    start, end = (index.members(number)[0].offset - BLOCK for number in (2, 4))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:start] + bytes(end - start) + whole[end:])
    kept = [f"{number:06d}" for number in (0, 1, 4, 5, 6, 7, 8)]
    now = open_index(shard)
    assert [*now.keys()] == kept
    assert ("gone since indexed", "000002") in [(damage.reason, damage.name) for damage in now.damage]
    drop_index(shard)
    if end % (20 * BLOCK):  # a joint of two tars otherwise, by all that can be seen
        assert [(d.reason, d.offset) for d in open_index(shard).damage] == [("end marker inside", start)]
    assert [*open_index(shard).keys()] == kept


def test_a_sample_that_is_left_alone_is_not_doubted(make_shards: Make) -> None:
    (shard,) = make_shards(3)
    end = open_index(shard).members(1)[0].offset - BLOCK
    shard.write_bytes(shard.read_bytes()[:end])
    drop_index(shard)
    assert [*_members(shard)] == ["000000"]
    assert _reasons(shard) == ["cut off"]


def test_sizes_in_extended_headers_are_believed(tmp_path: Path) -> None:
    """Some writers give every size there; the header's own field is then 0 where it is too small for it."""
    info = tarfile.TarInfo("a.txt")
    info.pax_headers = {"size": "700"}
    data = bytearray(info.tobuf(tarfile.PAX_FORMAT)) + b"x" * 700 + bytes(324)
    shard = tmp_path / "a.tar"
    shard.write_bytes(bytes(data) + _tar(tmp_path / "rest.tar", ("b.txt", b"two")).read_bytes())
    assert _members(shard) == {"a": {"txt": b"x" * 700}, "b": {"txt": b"two"}}
    assert _reasons(shard) == []


def test_more_kinds_of_members_than_a_byte_counts(tmp_path: Path) -> None:
    members = [(f"{number // 2}.kind{number}", b"%d" % number) for number in range(600)]
    shard = _tar(tmp_path / "a.tar", *members)
    open_index(shard)
    stored = stored_index(shard)
    assert stored is not None
    assert stored.arrays["extensions"].dtype == "<u2"
    assert [member.extension for member in stored.members(299)] == ["kind598", "kind599"]


def test_names_cannot_write_to_a_terminal(tmp_path: Path) -> None:
    shard = _tar(tmp_path / "a.tar", ("a.txt", b"x"), ("b\x1b[2J.txt", b"x"))
    assert [damage.name for damage in open_index(shard).damage] == ["b\\x1b[2J.txt"]


def test_indexes_are_kept_in_the_folder_that_is_named(make_shards: Make, tmp_path: Path) -> None:
    one, two = make_shards(5)[0], make_shards(3)[0]  # of one name, in two folders
    folder = tmp_path / "indexes"
    for shard in (one, two):
        drop_index(shard)
        open_index(shard, index_dir=folder)
    assert not index_path(one).exists()
    assert len(list(folder.iterdir())) == 2
    assert [len(stored_index(shard, folder) or []) for shard in (one, two)] == [5, 3]
    assert len(Pool([one, two], index_dir=folder)) == 8
    os.utime(one, ns=(1, 1))
    open_index(one, index_dir=folder)
    stored = stored_index(one, folder)
    assert stored is not None
    assert stored.identity == "1"


def test_no_index_takes_memory_that_the_shard_does_not_have(tmp_path: Path) -> None:
    """Damage is listed up to a number; the rest is counted."""
    link = _special("x", tarfile.SYMTYPE, "y").tobuf(tarfile.GNU_FORMAT)
    found = group(Damage(number * BLOCK, "link", "x") for number in range(MAX_LISTED_DAMAGE + 7))
    assert len(found.damage) == MAX_LISTED_DAMAGE + 1
    assert found.damage[-1].name == "7 places more"
    shard = tmp_path / "a.tar"
    shard.write_bytes(link * 5 + bytes(2 * BLOCK))
    assert _reasons(shard) == ["link"] * 5


def test_commands_and_unclosed_braces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pipe:"):
        expand_shards("pipe:rm -rf /")
    with pytest.raises(ConfigError, match="braces"):
        expand_shards("s3://bucket/shard-{000..009.tar")
    with pytest.raises(ConfigError, match="more than"):
        expand_shards("s3://bucket/shard-{0..9999999}.tar")


def test_urls_are_expanded_without_asking_anybody() -> None:
    shards = expand_shards(["s3://bucket/a-{0..2}.tar", "https://user:secret@host/b.tar?signature=abc"])
    assert shards == [*(f"s3://bucket/a-{n}.tar" for n in range(3)), "https://user:secret@host/b.tar?signature=abc"]
    assert [shard.name for shard in shards] == ["a-0.tar", "a-1.tar", "a-2.tar", "b.tar"]
    assert shown(shards[-1]) == "https://host/b.tar"


def test_remote_folders_and_patterns_ask_the_store() -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for name in ("b.tar", "a.tar", "a.tar.mmf.idx"):
        store.pipe(f"/test-index/{name}", b"")
    assert expand_shards("memory://test-index") == ["memory:///test-index/a.tar", "memory:///test-index/b.tar"]
    assert expand_shards("memory://test-index/b*") == ["memory:///test-index/b.tar"]
    with pytest.raises(MissingInput, match="there; name the shards"):
        expand_shards("memory://test-index/none")
    with pytest.raises(MissingInput, match="nowhere"):
        expand_shards("nowhere://bucket/folder")


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
