"""data/columns.py: what is read off one sample, and what is said of one that cannot be read."""

import hashlib
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from mmfoundry.data import columns
from mmfoundry.data.columns import (
    COLUMNS,
    COMPUTED,
    IDENTITY,
    column_named,
    is_similarity,
    pixel_deviation,
    rows_of,
    schema,
    scorer_of,
    uid_of,
)
from mmfoundry.data.decode import DecodeLimits
from mmfoundry.data.sample import RawSample
from tests.data.conftest import encode, smooth

EVERY = frozenset(COMPUTED) | set(IDENTITY)  # what a sample's own bytes tell
SHARD = Path("pool/shard-00000.tar")


def raw(meta: object = None, key: str = "000001", **members: bytes) -> RawSample:
    extra = {} if meta is None else {"json": json.dumps(meta).encode()}
    return RawSample(key, members | extra, SHARD)


def test_columns_of_a_good_sample() -> None:
    png = encode(smooth(1, height=20, width=50))
    sample = raw({"uid": "AB" * 16, "captions": ["a red  apple ", "two"], "similarity": 0.25}, png=png, txt=b"not read")
    rows = rows_of(sample, 3, 7, EVERY | {"json.similarity"}, DecodeLimits())
    assert [row["caption"] for row in rows] == ["a red  apple", "two"]
    assert [row["caption_index"] for row in rows] == [0, 1]
    first = rows[0]
    assert (first["uid"], first["key"], first["shard"], first["index"]) == ("ab" * 16, "000001", 3, 7)
    assert (first["width"], first["height"], first["aspect"]) == (50, 20, 2.5)
    assert first["sha256"] == hashlib.sha256(png).digest()
    assert (first["image_bytes"], len(first["perceptual_hash"])) == (len(png), 64)
    assert first["json.similarity"] == "0.25"
    assert first["unreadable"] is None
    assert set(first) - {"json.similarity"} == EVERY


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("decoded without need")

    monkeypatch.setattr(columns, "decode_image", never)
    cut = encode(smooth(1))[:-80]  # the header is there, the last pixels are not
    row = rows_of(raw(png=cut, txt=b"a b c"), 0, 0, frozenset({"width"}), DecodeLimits())[0]
    assert (row["width"], row["unreadable"]) == (16, None)
    assert not {"height", "sha256", "perceptual_hash"} & set(row)
    monkeypatch.setattr(columns, "image_size", never)
    assert rows_of(raw(png=b"?", txt=b"a"), 0, 0, frozenset({"sha256"}), DecodeLimits())[0]["unreadable"] is None


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"png": encode(smooth(1))[:-80], "txt": b"a"}, "damaged image"),
        ({"png": b"", "txt": b"a"}, "empty image"),
        ({"png": b"GIF?", "txt": b"a"}, "unknown image format"),
        ({"png": encode(smooth(1, 64, 64)), "txt": b"a"}, "too many pixels"),
        ({"png": encode(smooth(1)), "txt": b"\xff\xfe"}, "text is not UTF-8"),
        ({"png": encode(smooth(1)), "json": b"{"}, "broken JSON"),
        ({"png": encode(smooth(1)), "json": b"[]"}, "JSON is not an object"),
        ({"txt": b"a"}, "no image"),
        ({}, "no image"),
    ],
)
def test_what_cannot_be_read_is_one_row_with_a_reason(members: dict[str, bytes], reason: str) -> None:
    rows = rows_of(RawSample("k", members, SHARD), 0, 0, EVERY, DecodeLimits(max_pixels=1000))
    assert [row["unreadable"] for row in rows] == [reason]
    assert rows[0].get("perceptual_hash") is None or reason.startswith(("text", "broken", "JSON"))
    assert len(rows[0]["uid"]) == 32


def test_size_and_bytes_of_a_cut_file_are_still_known() -> None:
    cut = encode(smooth(1, height=8, width=24))[:-80]
    row = rows_of(raw(png=cut, txt=b"a b c"), 0, 0, EVERY, DecodeLimits())[0]
    assert (row["width"], row["height"], row["aspect"], row["unreadable"]) == (24, 8, 3.0, "damaged image")
    assert row["sha256"] == hashlib.sha256(cut).digest()


def test_without_captions_there_is_one_row() -> None:
    rows = rows_of(raw(png=encode(smooth(1)), txt=b" \n "), 0, 0, EVERY, DecodeLimits())
    assert len(rows) == 1
    assert "caption" not in rows[0]
    assert rows[0]["unreadable"] is None


@pytest.mark.parametrize("value", ["xyz", "a" * 31, 7, None, ["a" * 32], "g" * 32])
def test_a_uid_that_is_none_is_made_from_the_sample(value: object) -> None:
    sample = raw(png=b"image")
    assert uid_of(sample, {"uid": value}) == uid_of(sample, {})


def test_made_uids_tell_samples_apart() -> None:
    base = RawSample("key", {"png": b"image"}, Path("a/shard.tar"))
    moved = RawSample("key", {"png": b"image"}, Path("b/shard.tar"))
    others = [
        RawSample("key", {"png": b"image"}, Path("a/other.tar")),
        RawSample("key2", {"png": b"image"}, Path("a/shard.tar")),
        RawSample("key", {"png": b"image2"}, Path("a/shard.tar")),
        RawSample("keyi", {"png": b"mage"}, Path("a/shard.tar")),
    ]
    assert uid_of(base, {}) == uid_of(moved, {}) == "c2bae5350029e63dc7119741c4d71fb7"
    assert len({uid_of(sample, {}) for sample in [base, *others]}) == 5


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.25, "0.25"), (3, "3"), (True, "true"), ("x y", "x y"), (None, None), ({"a": 1}, None), ([1], None)],
)
def test_plain_values_of_the_json_are_text(value: object, text: str | None) -> None:
    row = rows_of(raw({"field": value}, png=b""), 0, 0, frozenset({"json.field"}), DecodeLimits())[0]
    assert row["json.field"] == text


def test_deviation_is_numpys() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (31, 17, 3), dtype=np.uint8)
    pixels[..., 1] //= 3
    assert pixel_deviation(pixels) == pytest.approx(pixels.reshape(-1, 3).std(axis=0).max(), abs=1e-9)
    assert pixel_deviation(np.full((4, 4, 3), 77, np.uint8)) == 0
    assert pixel_deviation(np.asarray(Image.new("RGB", (1, 1)))) == 0


def test_schema_has_identity_and_what_was_asked_for() -> None:
    names = list(schema(frozenset({"height", "width", "json.b", "json.a", "uid"})))
    assert names[-4:] == ["width", "height", "json.a", "json.b"]
    assert names[0] == "uid"
    assert all(column.about for column in COLUMNS.values())


def test_what_the_pools_json_says(tmp_path: Path) -> None:
    """Values that DataComp's metadata has, where a sample's own JSON has them; null where they are of another kind."""
    asked = frozenset({"url", "face_bboxes", "clip_b32_similarity_score", "json.similarity"})
    good = {
        "url": "https://x/1.jpg",
        "face_bboxes": [[0, 0.1, 0.5, 1]],
        "clip_b32_similarity_score": 0.3,
        "similarity": 1,
    }
    odd = {"url": 3, "face_bboxes": [[0, 1]], "clip_b32_similarity_score": True, "similarity": [1]}
    rows = [rows_of(raw(meta, png=b"?"), 0, 0, asked, DecodeLimits())[0] for meta in (good, odd, {})]
    table = pl.DataFrame(rows, schema=schema(asked), orient="row").select(sorted(asked))
    assert table.rows() == [
        (0.3, [[0.0, 0.1, 0.5, 1.0]], "1", "https://x/1.jpg"),
        (None, None, None, None),
        (None, None, None, None),
    ]


def test_columns_by_name() -> None:
    for name in ("uid", "language", "clip_any_similarity_score", "l14_img", "any_txt", "json.whatever"):
        assert column_named(name) is not None, name
    assert column_named("widht") is None
    assert (scorer_of("l14_img"), scorer_of("clip_b32_similarity_score"), scorer_of("width")) == ("l14", "b32", None)
    assert is_similarity("clip_b32_similarity_score")
    assert not is_similarity("b32_img")
