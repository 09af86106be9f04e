"""data/parts.py: DataComp's metadata as parts of a pool."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfoundry.data import parts
from mmfoundry.data.parts import TablePart, metadata_files, metadata_parts, npz_rows
from mmfoundry.pipeline.errors import DamagedInput, MissingInput, UnknownColumn

UID = "0123456789abcdef0123456789ABCDEF"


def write(path: Path, **columns: Any) -> Path:
    rows = len(next(iter(columns.values())))
    base = {"uid": [f"{n:032x}" for n in range(rows)], "text": [f"text {n}" for n in range(rows)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(base | columns).write_parquet(path)
    return path


def test_datacomps_names_become_ours(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.parquet",
        uid=[UID, "short", None],
        text=["  a dog\n", None, ""],
        original_width=[640, -1, None],
        original_height=[320, 0, 7],
        sha256=["ab" * 32, "not hex", None],
        punsafe=[0.25, None, 1.0],
    )
    columns = ["uid", "key", "shard", "index", "caption_index", "caption", "unreadable", "width", "height", "aspect"]
    columns += ["sha256", "json.punsafe"]
    found, broken = metadata_parts([file], columns)
    table = found[0].read(columns)
    assert (len(found), broken, table.height) == (1, {}, 3)
    assert table["uid"][0] == UID.lower()
    assert table["caption"].to_list() == ["  a dog\n", None, ""], "captions are taken as they are, as DataComp does"
    assert table["caption_index"].to_list() == [0, None, 0]
    assert table["width"].to_list() == [640, None, None]
    assert table["aspect"].to_list() == [2.0, None, None]
    assert table["sha256"].to_list() == [bytes.fromhex("ab" * 32), None, None]
    assert table["json.punsafe"].to_list() == ["0.25", None, "1.0"]
    assert table["unreadable"].to_list() == [None, "uid is not 32 hex digits", "uid is not 32 hex digits"]
    assert table["uid"].n_unique() == 3
    assert table["index"].to_list() == [0, 1, 2]


@pytest.mark.parametrize("uids", [[UID, UID.upper()], [UID, "short"], ["0" * 32, None]])
@pytest.mark.parametrize("statistics", [True, False])
def test_uids_are_given_as_numbers_too(tmp_path: Path, uids: list[str | None], statistics: bool) -> None:
    texts = ["a", None] if uids[1] else ["a", "b"]
    pl.DataFrame({"uid": uids, "text": texts}).write_parquet(tmp_path / "a.parquet", statistics=statistics)
    found, _ = metadata_parts([tmp_path / "a.parquet"], [])
    table = found[0].read(["uid", "high", "low", "unreadable", "caption_index"])
    assert [divmod(int(uid, 16), 2**64) for uid in table["uid"]] == table.select("high", "low").rows()
    assert table["unreadable"].is_null().to_list() == [len(uid or "") == 32 for uid in uids]
    assert table["caption_index"].to_list() == [None if text is None else 0 for text in texts]
    table.write_parquet(tmp_path / "table.parquet")
    of_tar = TablePart(3, "a.tar", "", (tmp_path / "table.parquet",)).read(["low", "high", "shard"])
    assert of_tar.select("high", "low").equals(table.select("high", "low"))
    assert of_tar.columns == ["high", "low", "shard"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 12))
def test_files_are_cut_into_parts_without_loss(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], most: int
) -> None:
    folder = tmp_path_factory.mktemp("metadata")
    expected = []
    for number, size in enumerate(sizes):
        uids = [f"{number:016x}{n:016x}" for n in range(size)]
        file = write(folder / f"{number}.parquet", uid=uids, text=uids)
        np.savez(file.with_suffix(".npz"), b32_img=np.arange(size * 2, dtype=np.float16).reshape(size, 2) + number)
        expected += uids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "MAX_ROWS", most)
        found, _ = metadata_parts(metadata_files(folder), ["uid", "b32_img"])
    tables = [part.read(["uid", "shard", "index", "b32_img"]) for part in found]
    assert all(table.height <= most for table in tables)
    whole = pl.concat(tables)
    assert whole["uid"].to_list() == expected
    assert [table["shard"].unique().to_list() for table in tables] == [[n] for n in range(len(tables))]
    for uid, row in zip(whole["uid"], whole["b32_img"], strict=True):
        file, place = int(uid[:16], 16), int(uid[16:], 16)
        assert row.to_list() == [2 * place + file, 2 * place + 1 + file]
    assert len({part.identity for part in found}) == len(found)


def test_where_metadata_lies(tmp_path: Path) -> None:
    file = write(tmp_path / "pool" / "metadata" / "a.parquet", x=[1])
    (tmp_path / "pool" / "shards").mkdir()
    assert metadata_files(tmp_path / "pool") == metadata_files(file.parent) == metadata_files(file) == [file]
    other = write(file.with_name("b.parquet"), x=[1])
    assert (
        metadata_files(file.with_name("*.parquet")) == metadata_files(file.with_name("{a,b}.parquet")) == [file, other]
    )
    assert metadata_files(tmp_path / "**" / "b.parquet") == [other]
    assert metadata_files(tmp_path / "pool" / "*.tar") == []
    write(tmp_path / "img2dataset" / "00000.parquet", x=[1])
    (tmp_path / "img2dataset" / "00000.tar").write_bytes(bytes(10240))
    assert metadata_files(tmp_path / "img2dataset") == []
    assert metadata_files(tmp_path / "nothing") == []


def test_what_is_missing_is_named_before_anything_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", original_width=[1])
    for column, says in [
        (
            "clip_l14_similarity_score",
            r"a\.parquet: .* reads clip_l14_similarity_score, which has to be computed",
        ),
        ("width", None),
        ("aspect", r"reads original_height, which has to be computed"),
        ("l14_img", r"reads l14_img, and there is no a\.npz beside it"),
        ("json.punsafe", r"reads punsafe, which is not there"),
        ("pixel_deviation", r"reads pixel_deviation, which has to be computed from images"),
    ]:
        if says is None:
            metadata_parts([file], [column])
        else:
            with pytest.raises(UnknownColumn, match=says):
                metadata_parts([file], [column])
    pl.DataFrame({"text": ["a"]}).write_parquet(file)
    with pytest.raises(UnknownColumn, match="reads uid"):
        metadata_parts([file], [])


def test_a_file_that_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    good = write(tmp_path / "b.parquet", x=[1, 2])
    bad = tmp_path / "a.parquet"
    bad.write_bytes(good.read_bytes()[:-20])
    found, broken = metadata_parts(metadata_files(tmp_path), [])
    assert [part.name for part in found] == ["b.parquet"]
    assert list(broken) == [bad]
    with pytest.raises(MissingInput, match="no row in its 1 parquet files"):
        metadata_parts([bad], [])


def test_a_file_without_rows_is_no_part(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", uid=[], text=[])
    with pytest.raises(MissingInput, match="no row in its 1 parquet files"):
        metadata_parts(metadata_files(tmp_path), [])
    write(tmp_path / "b.parquet", x=[1, 2])
    found, broken = metadata_parts(metadata_files(tmp_path), [])
    assert [(part.name, part.count) for part in found] == [("b.parquet", 2)]
    assert not broken


def test_an_altered_file_is_noticed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", x=[1, 2])
    found, _ = metadata_parts([file], [])
    write(file, x=[1])
    with pytest.raises(DamagedInput, match="has changed since the run began"):
        found[0].read(["uid"])


def test_embeddings_that_cannot_be_meant(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, good=np.arange(12.0).reshape(4, 3), flat=np.arange(3), objects=np.array([{}, []], object))
    np.testing.assert_array_equal(npz_rows(path, "good", 1, 2), np.arange(12.0).reshape(4, 3)[1:3])
    for name, start, count in [("flat", 0, 1), ("objects", 0, 1), ("good", 2, 3), ("none", 0, 1)]:
        with pytest.raises(DamagedInput, match=name):
            npz_rows(path, name, start, count)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DamagedInput, match="good cannot be read"):
        npz_rows(path, "good", 0, 1)
