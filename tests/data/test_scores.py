"""data/scores.py: every row gets its own picture's and caption's numbers, whatever else is in the shard."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from mmfoundry.data import scores as module
from mmfoundry.data.decode import DecodeLimits
from mmfoundry.data.reader import Pool
from mmfoundry.data.regions import NO_REGIONS, from_boxes
from mmfoundry.data.scores import Head, Scoring, score_pairs, similarity
from mmfoundry.data.shards import write_shards
from mmfoundry.data.table import Request, describe_shard
from tests.data.conftest import encode, smooth

TEXT = from_boxes([[0.25, 0.25, 0.75, 0.75]])


class Means:
    """An encoder that can be checked by hand: a picture is its mean colour, a caption the counts of three letters."""

    context_characters = 50

    def __init__(self) -> None:
        self.prepared = 0
        self.sizes: list[int] = []
        self.texts: list[str] = []

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        self.prepared += 1
        return pixels.reshape(-1, 3).mean(axis=0).astype(np.float32) + 1

    def embed_images(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        self.sizes.append(len(prepared))
        return unit(np.stack(prepared))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        self.texts += texts
        return unit(np.array([[1 + text.count(letter) for letter in "rgb"] for text in texts], np.float32))


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def has_text(pixels: np.ndarray) -> np.ndarray:
    return TEXT if pixels[0, 0, 0] < 128 else NO_REGIONS


def the_shard(folder: Path, count: int = 11) -> Path:
    """Pictures with 0 to 3 captions; number 2 is cut off, number 4 has no image, number 6 broken JSON."""
    made: list[dict[str, Any]] = []
    for number in range(count):
        captions = [f"r{'g' * number} {i}" for i in range((number + 1) % 4)]
        sample: dict[str, Any] = {"__key__": str(number), "png": encode(smooth(number)), "json": {"captions": captions}}
        if number == 2:
            sample["png"] = sample["png"][:-40]
        if number == 4:
            del sample["png"]
        if number == 6:
            sample["json"] = b"{"
        made.append(sample)
    (shard,) = write_shards(made, folder)
    return shard


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return the_shard(tmp_path)


def table_of(shard: Path) -> pl.DataFrame:
    return describe_shard(Request(frozenset(), DecodeLimits()), 3, shard)[0]


def score(shard: Path, table: pl.DataFrame | None = None, **changes: Any) -> pl.DataFrame:
    table = table_of(shard) if table is None else table
    return score_pairs(Pool(shard), table, Scoring(**changes), DecodeLimits())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_rows_have_their_own_scores(shard: Path, batch_size: int, threads: int) -> None:
    encoder = Means()
    columns = frozenset({similarity("m"), "m_img", "m_txt"})
    table = table_of(shard)
    found = score(
        shard, table, columns=columns, encoders={"m": encoder}, batch_sizes={"m": batch_size}, threads=threads
    )
    assert found.columns == ["shard", "index", "caption_index", similarity("m"), "m_img", "m_txt"]
    assert found.select("shard", "index", "caption_index").equals(table.select("shard", "index", "caption_index"))
    assert max(encoder.sizes) <= batch_size
    for row, said in zip(found.iter_rows(named=True), table.iter_rows(named=True), strict=True):
        if row["index"] in (2, 4, 6):
            assert row["m_img"] is None
            assert row["m_txt"] is None
            assert row[similarity("m")] is None
            continue
        image = unit(smooth(row["index"]).reshape(1, -1, 3).mean(axis=1).astype(np.float32) + 1)[0]
        np.testing.assert_allclose(row["m_img"], image, rtol=1e-6)
        if said["caption"] is None:
            assert row["m_txt"] is None
            assert row[similarity("m")] is None
        else:
            text = Means().embed_texts([said["caption"]])[0]
            np.testing.assert_allclose(row["m_txt"], text, rtol=1e-6)
            assert row[similarity("m")] == pytest.approx(float(image @ text), rel=1e-6)


def test_each_picture_is_decoded_once_for_all(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    real = module.decode_image

    def counted(data: bytes, limits: DecodeLimits) -> np.ndarray:
        decoded.append(len(data))
        return real(data, limits)

    monkeypatch.setattr(module, "decode_image", counted)
    one, two = Means(), Means()
    score(
        shard,
        columns=frozenset({similarity("one"), "two_img", "text_area", "face_bboxes"}),
        encoders={"one": one, "two": two},
        text=has_text,
        faces=has_text,
    )
    readable = table_of(shard).filter(pl.col("unreadable").is_null())["index"].n_unique()
    assert len(decoded) == readable == 9  # the one that is cut off is tried as well
    assert one.prepared == two.prepared == 8
    assert one.texts
    assert not two.texts


def test_detectors_tell_area_and_boxes(shard: Path) -> None:
    found = score(shard, columns=frozenset({"text_area", "face_bboxes"}), text=has_text, faces=has_text)
    for row in found.iter_rows(named=True):
        if row["index"] in (2, 4, 6):
            assert row["text_area"] is None
            assert row["face_bboxes"] is None
        elif smooth(row["index"])[0, 0, 0] < 128:
            assert row["text_area"] == pytest.approx(0.25, abs=0.1)
            assert row["face_bboxes"] == [[0.25, 0.25, 0.75, 0.75]]
        else:
            assert row["text_area"] == 0.0
            assert row["face_bboxes"] == []
    assert found["face_bboxes"].null_count() < found.height
    assert {0.0} < set(found["text_area"].drop_nulls())


def test_masked_scores_are_of_the_picture_without_its_text(shard: Path) -> None:
    encoder = Means()
    columns = frozenset({similarity("m"), similarity("m", masked=True)})
    found = score(shard, columns=columns, encoders={"m": encoder}, batch_sizes={"m": 3}, text=has_text)
    differ = 0
    for row in found.drop_nulls().iter_rows(named=True):
        pixels = smooth(row["index"])
        text = unit(np.array([[2 if row["index"] >= 0 else 1, 1 + row["index"], 1]], np.float32))[0]
        bare = module.without(pixels, has_text(pixels)).reshape(-1, 3).mean(axis=0).astype(np.float32) + 1
        assert row[similarity("m", masked=True)] == pytest.approx(float(unit(bare[None])[0] @ text), rel=1e-6)
        assert (row[similarity("m")] == row[similarity("m", masked=True)]) == (pixels[0, 0, 0] >= 128)
        differ += row[similarity("m")] != row[similarity("m", masked=True)]
    assert differ >= 3
    assert encoder.prepared == 8 + sum(smooth(n)[0, 0, 0] < 128 for n in range(11) if n not in (2, 4, 6))


def test_a_shard_without_any_text_has_masked_scores(shard: Path) -> None:
    columns = frozenset({similarity("m"), similarity("m", masked=True)})
    found = score(shard, columns=columns, encoders={"m": Means()}, text=lambda pixels: NO_REGIONS)
    assert found[similarity("m")].equals(found[similarity("m", masked=True)])
    assert found[similarity("m")].is_not_null().any()


def test_heads_read_pictures_or_captions(shard: Path) -> None:
    first: Callable[[np.ndarray], np.ndarray] = lambda rows: rows[:, 0]  # noqa: E731
    found = score(
        shard,
        columns=frozenset({"seen_score", "said_score", "m_img", "m_txt"}),
        encoders={"m": Means()},
        heads={"seen_score": Head("m", "image", first), "said_score": Head("m", "text", first)},
    )
    for row in found.iter_rows(named=True):
        assert row["seen_score"] == (None if row["m_img"] is None else row["m_img"][0])
        assert row["said_score"] == (None if row["m_txt"] is None else row["m_txt"][0])
    alone = score(
        shard,
        columns=frozenset({"seen_score"}),
        encoders={"m": Means()},
        heads={"seen_score": Head("m", "image", first)},
    )
    assert alone["seen_score"].equals(found["seen_score"])


def test_what_is_not_finite_is_null(shard: Path) -> None:
    class Overflowing(Means):
        def embed_images(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
            rows = super().embed_images(prepared)
            rows[0] = np.nan
            return rows

    columns = frozenset({similarity("m"), "m_img"})
    found = score(shard, columns=columns, encoders={"m": Overflowing()}, batch_sizes={"m": 100})
    assert found.filter(pl.col("index") == 0)["m_img"].is_null().all()
    assert not found[similarity("m")].is_nan().any()
    assert found.filter(pl.col("index") == 1)["m_img"].is_not_null().all()


def test_captions_are_cut_before_a_tokenizer_sees_a_megabyte(tmp_path: Path) -> None:
    captions = ["r" * 1_000_000, "", "NUL \0 byte", "مرحبا 👩‍👩‍👧", "same", "same"]
    (shard,) = write_shards([{"__key__": "a", "png": encode(smooth(0)), "json": {"captions": captions}}], tmp_path)
    encoder = Means()
    found = score(shard, columns=frozenset({similarity("m")}), encoders={"m": encoder})
    assert found[similarity("m")].null_count() == 0
    assert max(map(len, encoder.texts)) == 50
    assert len(encoder.texts) == found.height - 1  # equal captions are embedded once
    table = table_of(shard)
    assert found.height == table.height


def test_a_shard_without_readable_pairs_gives_nulls(shard: Path) -> None:
    table = table_of(shard).filter(pl.col("index").is_in([4, 6]))
    parts: dict[str, Any] = {
        "columns": frozenset({similarity("m"), "m_img", "m_txt", "text_area", "a_score"}),
        "encoders": {"m": Means()},
        "heads": {"a_score": Head("m", "image", lambda rows: rows[:, 0])},
        "text": has_text,
    }
    found = score(shard, table, **parts)
    assert found.height == table.height > 0
    assert all(found[name].is_null().all() for name in parts["columns"])
    assert found.schema == score(shard, **parts).schema
