"""Folders, tables and tars of others become shards: the same bytes each time, and nothing is left out silently."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from mmfoundry.data.convert import ConvertOptions, convert
from mmfoundry.data.reader import Pool
from mmfoundry.pipeline.errors import DamagedInput, MissingInput, TooManyUnreadable, UnknownColumn
from tests.data.conftest import encode, smooth

Make = Callable[..., list[Path]]
LENIENT = ConvertOptions(max_unreadable=1)


def _content(shards: Path | list[Path]) -> dict[str, dict[str, bytes]]:
    pool = Pool(shards)
    assert pool.damage == []
    return {raw.key: raw.members for raw in map(pool.get, range(len(pool)))}


def _left_out(output: Path) -> list[tuple[str, str]]:
    lines = (output / "left_out.jsonl").read_text(encoding="utf-8").splitlines()
    return [(skip["key"], skip["reason"]) for skip in map(json.loads, lines)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more.of").mkdir(parents=True)
    (folder / "b.PNG").write_bytes(encode(smooth(1)))
    (folder / "b.txt").write_text("one\ntwo")
    (folder / "a.v2.jpg").write_bytes(encode(smooth(2), "JPEG"))
    (folder / "more.of" / "c.webp").write_bytes(encode(smooth(3), "WEBP"))
    (folder / "more.of" / "c.json").write_text('{"captions": ["three"]}')
    (folder / "notes.txt").write_text("no picture of this name")
    return folder


def test_a_folder_of_pictures(photos: Path, tmp_path: Path) -> None:
    shards, tally = convert(str(photos), tmp_path / "out")
    found = _content(shards)
    assert found == {
        "a_v2": {"jpg": (photos / "a.v2.jpg").read_bytes()},
        "b": {"png": (photos / "b.PNG").read_bytes(), "txt": b"one\ntwo"},
        "more.of/c": {
            "webp": (photos / "more.of" / "c.webp").read_bytes(),
            "json": b'{"captions": ["three"]}',
        },
    }
    assert (tally.drawn, tally.skipped) == (3, 0)
    again, _ = convert(str(photos), tmp_path / "again")
    assert [shard.read_bytes() for shard in again] == [shard.read_bytes() for shard in shards]


def test_what_a_folder_cannot_give_is_named(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encode(smooth(4)))
    (photos / "link.png").symlink_to(tmp_path / "secret.png")
    (photos / "loop.png").symlink_to(photos / "loop.png")
    (photos / "broken.png").write_bytes(b"no picture")
    (photos / "a_v2.png").write_bytes(encode(smooth(5)))  # its key is that of a.v2.jpg
    _, tally = convert(str(photos), tmp_path / "out", LENIENT)
    assert sorted(_left_out(tmp_path / "out")) == [
        ("a_v2", "duplicate key"),
        ("broken", "unknown image format"),
        ("link", "outside the folder"),
        ("loop", "cannot be read"),
    ]
    assert sorted(_content(tmp_path / "out")) == ["a_v2", "b", "more.of/c"]
    assert tally.drawn - tally.skipped == 3
    with pytest.raises(TooManyUnreadable, match="max_unreadable"):
        convert(str(photos), tmp_path / "strict", ConvertOptions(max_unreadable=0))


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl"])
def test_a_table_of_paths(photos: Path, tmp_path: Path, kind: str) -> None:
    table = pl.DataFrame(
        {
            "image": ["b.PNG", "more.of/c.webp", "none.jpg", "../secret.png", "notes.txt", None],
            "caption": [" one\n two ", None, "x", "x", "x", "x"],
            "licence": ["CC0", None, "x", "x", "x", "x"],
        }
    )
    (tmp_path / "secret.png").write_bytes(encode(smooth(4)))
    path = photos / f"table.{kind}"
    if kind in ("csv", "tsv"):
        table.write_csv(path, separator="," if kind == "csv" else "\t")
    else:
        getattr(table, "write_parquet" if kind == "parquet" else "write_ndjson")(path)
    convert(str(path), tmp_path / "out", LENIENT)
    assert _content(tmp_path / "out") == {
        "000000000": {"png": (photos / "b.PNG").read_bytes(), "txt": b"one two", "json": b'{"licence": "CC0"}'},
        "000000001": {"webp": (photos / "more.of" / "c.webp").read_bytes()},
    }
    assert _left_out(tmp_path / "out") == [
        ("000000002", "no file"),
        ("000000003", "outside the folder"),
        ("000000004", "unknown image format"),
        ("000000005", "no image"),
    ]


def test_a_table_may_name_its_columns_and_lie_elsewhere(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    rows = [{"file": "b.PNG", "texts": ["one", "two"], "score": 0.5, "tags": {"a": [1]}}, {"file": "a.v2.jpg"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    options = ConvertOptions(image_column="file", caption_column="texts", images=photos)
    convert(str(path), tmp_path / "out", options)
    found = _content(tmp_path / "out")
    assert found["000000000"]["txt"] == b"one\ntwo"
    assert json.loads(found["000000000"]["json"]) == {"score": 0.5, "tags": {"a": [1]}}
    with pytest.raises(UnknownColumn, match=r"no column 'image'.*file, texts"):
        convert(str(path), tmp_path / "out", ConvertOptions(images=photos))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DamagedInput, match=r"bad\.parquet"):
        convert(str(tmp_path / "bad.parquet"), tmp_path / "out")
    with pytest.raises(MissingInput, match="no such table"):
        convert(str(tmp_path / "none.csv"), tmp_path / "out")


@pytest.mark.parametrize("packed", [False, True])
def test_tars_of_others_keep_their_samples(make_shards: Make, tmp_path: Path, packed: bool) -> None:
    shards = make_shards(20)
    expected = _content(shards)
    source = shards[0].parent
    if packed:
        source = tmp_path / "packed"
        source.mkdir()
        for shard in shards:
            (source / f"{shard.name}.gz").write_bytes(gzip.compress(shard.read_bytes()))
    made, tally = convert(str(source), tmp_path / "out", ConvertOptions(max_count=7))
    assert _content(made) == expected
    assert (len(made), tally.drawn, tally.skipped) == (3, 20, 0)


def test_damage_and_repeats_in_tars_are_named(make_shards: Make, tmp_path: Path) -> None:
    (one,) = make_shards(5)
    (two,) = make_shards(3, first=4)  # 000004 comes again
    data = bytearray(one.read_bytes())
    data[3] ^= 1
    one.write_bytes(data)
    folder = tmp_path / "both"
    folder.mkdir()
    shutil.copy(one, folder / "a.tar")
    shutil.copy(two, folder / "b.tar")
    convert(str(folder), tmp_path / "out", LENIENT)
    assert sorted(_content(tmp_path / "out")) == [f"{number:06d}" for number in range(1, 7)]
    left_out = _left_out(tmp_path / "out")
    assert ("000000", "incomplete sample") in left_out
    assert ("000004", "duplicate key") in left_out


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInput, match="nothing in it"):
        convert(str(tmp_path / "empty"), tmp_path / "out")
