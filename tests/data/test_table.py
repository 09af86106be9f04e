"""data/table.py, scores.py and reshard.py: from shards to a table, and from a selection back to shards."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from mmfoundry.data import table as tables
from mmfoundry.data.columns import COMPUTED
from mmfoundry.data.decode import DecodeLimits
from mmfoundry.data.index import open_index
from mmfoundry.data.reader import Pool
from mmfoundry.data.reshard import curated_samples
from mmfoundry.data.scores import score_table
from mmfoundry.data.shards import write_shards
from mmfoundry.data.table import Request, describe_shards, read_table, read_truth, truth_of, unreadable_counts
from mmfoundry.pipeline.errors import MmfoundryError
from tests.data.conftest import encode, smooth

EVERY = frozenset(name for name, column in COMPUTED.items() if column.needs != "model") | {"unreadable"}
MakeShards = Callable[..., list[Path]]


def described(shards: Sequence[Path], folder: Path, columns: frozenset[str] = EVERY, **options: object) -> pl.DataFrame:
    request = Request(columns, DecodeLimits(), folder)
    numbered = [(number, open_index(shard)) for number, shard in enumerate(shards)]
    done: list[int] = []
    describe_shards(request, numbered, options.get("num_workers", 1), done.append)  # type: ignore[arg-type]
    assert sorted(done) == list(range(len(shards)))
    return read_table(request, len(shards))


def pool_of(samples: list[dict], folder: Path, per_shard: int = 100) -> list[Path]:
    return write_shards(samples, folder, max_count=per_shard)


def test_every_pair_is_a_row(make_shards: MakeShards, tmp_path: Path) -> None:
    found = described(make_shards(25, 10), tmp_path)
    assert found.height == 50
    assert found["shard"].to_list() == [0] * 20 + [1] * 20 + [2] * 10
    assert found["index"].to_list() == [n % 10 for n in range(25) for _ in range(2)]
    assert found["caption"][:2].to_list() == ["picture 0", "another line for 0"]
    assert found["uid"][2] == f"{1:032x}"
    assert found.drop("unreadable").null_count().sum_horizontal()[0] == 0


def test_workers_write_the_same_bytes(make_shards: MakeShards, tmp_path: Path) -> None:
    shards = make_shards(30, 10)
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert_frame_equal(described(shards, alone), described(shards, together, num_workers=2))
    for number in range(3):
        name = f"table/{number:05d}.parquet"
        assert (alone / name).read_bytes() == (together / name).read_bytes()


def test_finished_shards_are_not_read_again(
    make_shards: MakeShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards(30, 10)
    whole = described(shards, tmp_path / "whole")
    request = Request(EVERY, DecodeLimits(), tmp_path / "cut")
    numbered = [(number, open_index(shard)) for number, shard in enumerate(shards)]

    def stop(shard: int) -> None:
        if shard == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        describe_shards(request, numbered, 1, stop)
    read: list[int] = []
    real = tables.describe_shard
    monkeypatch.setattr(tables, "describe_shard", lambda r, n, s: (read.append(n), real(r, n, s)))
    assert_frame_equal(described(shards, tmp_path / "cut"), whole)
    assert read == [2]


def test_a_worker_that_dies_is_told_in_one_line(
    make_shards: MakeShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered = [(number, open_index(shard)) for number, shard in enumerate(make_shards(20, 10))]
    # exits without a word, as a process does that runs out of memory
    monkeypatch.setattr(tables, "describe_shard", _die)
    with pytest.raises(MmfoundryError, match="fewer num_workers"):
        describe_shards(Request(EVERY, DecodeLimits(), tmp_path), numbered, 2, lambda shard: None)


def _die(*_: object) -> None:
    import os

    os._exit(9)


def test_damage_costs_the_damaged_sample_only(make_shards: MakeShards, tmp_path: Path) -> None:
    shard = make_shards(10, 10)[0]
    third = open_index(shard).members(3)[1]
    with shard.open("r+b") as file:
        file.seek(third.offset - 512)  # the header of a member of sample 3
        file.write(b"\xff" * 512)
    found = described([shard], tmp_path)
    assert set(found["key"]) == {f"{n:06d}" for n in range(10) if n != 3}


def test_unreadable_samples_are_counted_by_reason(tmp_path: Path) -> None:
    good = encode(smooth(1))
    pool = pool_of(
        [
            {"__key__": "a", "png": good, "txt": "one\ntwo"},
            {"__key__": "b", "png": good[:-80], "txt": "one\ntwo"},
            {"__key__": "c", "png": good[:-80], "txt": "one"},
            {"__key__": "d", "txt": "one"},
        ],
        tmp_path / "pool",
    )
    request = Request(EVERY, DecodeLimits(), tmp_path)
    described(pool, tmp_path)
    assert unreadable_counts(request, 0) == {"damaged image": 2, "no image": 1}


def test_truth_is_kept_apart(tmp_path: Path) -> None:
    good = encode(smooth(1))
    told = [{"bad": None, "concept": "x"}, {"bad": "blank"}, {"bad": "copy", "of": "1" * 32}, "odd", {"bad": 3}]
    samples = [{"__key__": str(n), "png": good, "txt": "a", "json": {"truth": said}} for n, said in enumerate(told)]
    pool = pool_of(samples, tmp_path / "pool")
    found = described(pool, tmp_path, EVERY | {"json.truth"})
    assert found["json.truth"].to_list() == [None, None, None, "odd", None]
    truth = read_truth(Request(EVERY, DecodeLimits(), tmp_path), 1)
    assert truth["bad"].to_list() == [None, "blank", "copy", None]
    assert truth["of"].to_list() == [None, None, "1" * 32, None]
    assert set(truth["uid"]) <= set(found["uid"])


def test_a_pool_without_truth_has_none(make_shards: MakeShards, tmp_path: Path) -> None:
    described(make_shards(5, 5), tmp_path)
    assert read_truth(Request(EVERY, DecodeLimits(), tmp_path), 1).height == 0
    assert truth_of(Pool(make_shards(1)).get(0)) == []


def test_an_empty_shard_among_others(make_shards: MakeShards, tmp_path: Path) -> None:
    shards = make_shards(5, 5)
    (shards[0].parent / "shard-00009.tar").write_bytes(bytes(10240))
    assert described([*shards, shards[0].parent / "shard-00009.tar"], tmp_path).height == 10


def test_scores_belong_to_their_pairs(make_shards: MakeShards, tmp_path: Path) -> None:
    """The score is the caption's length plus the image's mean, so a pair that gets another's score is seen."""
    shards = make_shards(7, 4)
    pool = Pool(shards)
    found = described(shards, tmp_path)
    asked: list[int] = []

    def scorer(images: Sequence[np.ndarray], captions: Sequence[Sequence[str]]) -> list[np.ndarray]:
        asked.append(len(images))
        return [np.array([len(c) + i.mean() for c in cs]) for i, cs in zip(images, captions, strict=True)]

    scores = score_table(pool, found, "clip_score", scorer, 3, DecodeLimits())
    assert asked == [3, 3, 1]
    assert scores.select("shard", "index", "caption_index").equals(found.select("shard", "index", "caption_index"))
    expected = [len(row["caption"]) + smooth(row["shard"] * 4 + row["index"]).mean() for row in found.to_dicts()]
    np.testing.assert_allclose(scores["clip_score"], expected, rtol=1e-6)


def test_what_cannot_be_scored_has_no_score(tmp_path: Path) -> None:
    good = encode(smooth(1))
    shards = pool_of(
        [
            {"__key__": "a", "png": good, "txt": ""},
            {"__key__": "b", "png": good[:-80], "txt": "one"},
            {"__key__": "c", "png": good, "txt": "one"},
        ],
        tmp_path / "pool",
    )
    for columns in (EVERY, frozenset({"width"})):  # whether or not the table knows that b does not decode
        request = Request(columns, DecodeLimits(), tmp_path / str(len(columns)))
        found = described(shards, request.folder, columns)
        scores = score_table(
            Pool(shards), found, "clip_score", lambda i, c: [np.ones(len(x)) for x in c], 8, DecodeLimits()
        )
        tables.write_parquet(scores, request.scores_path(0))
        joined = read_table(request, 1)
        assert joined.select("key", "clip_score").rows() == [("a", None), ("b", None), ("c", 1.0)]


def curated(tmp_path: Path, samples: list[dict], kept: list[tuple[int, int | None]]) -> list[dict[str, bytes]]:
    """Members of the samples that are written when these (index, caption) pairs are kept."""
    pool = Pool(pool_of(samples, tmp_path / "in"))
    rows = pl.DataFrame(
        [(f"{index:032x}", 0, index, caption) for index, caption in kept],
        schema={"uid": pl.String, "shard": pl.UInt32, "index": pl.UInt32, "caption_index": pl.UInt32},
        orient="row",
    )
    again = Pool(write_shards(curated_samples(pool, rows), tmp_path / "out"))
    keys = [again.key(n) for n in range(len(again))]
    assert keys == list(dict.fromkeys(f"{index:032x}" for index, _ in kept))
    return [again.get(n).members for n in range(len(again))]


def test_kept_samples_keep_their_bytes(tmp_path: Path) -> None:
    good, uid = encode(smooth(1)), f"{0:032x}"
    text = json.dumps({"captions": ["a", "b"], "uid": uid}, indent=3).encode()
    sample = {"__key__": "x/y", "png": good, "txt": "a\r\nb", "json": text, "npy": b"\x00\x01"}
    [members] = curated(tmp_path, [sample], [(0, 0), (0, 1)])
    assert members == {"png": good, "txt": b"a\r\nb", "json": text, "npy": b"\x00\x01"}


def test_cut_captions_are_gone_everywhere(tmp_path: Path) -> None:
    good = encode(smooth(1))
    both = {"__key__": "a", "png": good, "txt": "one", "json": {"captions": ["one", "two", "three"], "n": 1}}
    text = {"__key__": "b", "png": good, "txt": "one\n\n two \nthree"}
    plain = {"__key__": "c", "png": good, "json": {"captions": ["one", "two"]}}
    first, second, third = curated(tmp_path, [both, text, plain], [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)])
    assert json.loads(first["json"]) == {"captions": ["two", "three"], "n": 1, "uid": f"{0:032x}"}
    assert first["txt"] == b"two"
    assert second["txt"] == b"one\nthree"
    assert json.loads(second["json"]) == {"uid": f"{1:032x}"}
    assert json.loads(third["json"])["captions"] == ["one", "two"]


def test_a_sample_without_captions_can_be_kept(tmp_path: Path) -> None:
    [members] = curated(tmp_path, [{"__key__": "a", "png": encode(smooth(1))}], [(0, None)])
    assert set(members) == {"png", "json"}
