"""data/table.py and new_shards.py: from shards to a table, and from a selection back to shards."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl

from mmfoundry.data.columns import COMPUTED
from mmfoundry.data.decode import DecodeLimits
from mmfoundry.data.filter_jobs import DescribeJob, describe
from mmfoundry.data.index import open_index
from mmfoundry.data.new_shards import ReshardOptions, shard_jobs, write
from mmfoundry.data.reader import Pool
from mmfoundry.data.shards import write_shards
from mmfoundry.data.table import Request, describe_shard, truth_of
from mmfoundry.data.table_cache import TableCache
from tests.data.conftest import encode, smooth

EVERY = frozenset(name for name, column in COMPUTED.items() if column.needs != "model") | {"unreadable"}
MakeShards = Callable[..., list[Path]]


def described(shards: Sequence[Path], columns: frozenset[str] = EVERY) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Table and truth of all shards."""
    request = Request(columns, DecodeLimits())
    both = [describe_shard(request, number, shard) for number, shard in enumerate(shards)]
    return pl.concat([table for table, _ in both]), pl.concat([truth for _, truth in both])


def cache_places(cache: TableCache) -> tuple[Path, Path]:
    return cache.path("table", "key", "0"), cache.path("truth", "key", "0")


def pool_of(samples: list[dict], folder: Path, per_shard: int = 100) -> list[Path]:
    return write_shards(samples, folder, max_count=per_shard)


def test_every_pair_is_a_row(make_shards: MakeShards) -> None:
    found = described(make_shards(25, 10))[0]
    assert found.height == 50
    assert found["shard"].to_list() == [0] * 20 + [1] * 20 + [2] * 10
    assert found["index"].to_list() == [n % 10 for n in range(25) for _ in range(2)]
    assert found["caption"][:2].to_list() == ["picture 0", "another line for 0"]
    assert found["uid"][2] == f"{1:032x}"
    assert found.drop("unreadable").null_count().sum_horizontal()[0] == 0


def test_damage_costs_the_damaged_sample_only(make_shards: MakeShards) -> None:
    shard = make_shards(10, 10)[0]
    third = open_index(shard).members(3)[1]
    with shard.open("r+b") as file:
        file.seek(third.offset - 512)  # the header of a member of sample 3
        file.write(b"\xff" * 512)
    found, _ = described([shard])
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
    job = DescribeJob(
        "pool", 0, pool[0], Request(EVERY, DecodeLimits()), cache := TableCache(tmp_path), *cache_places(cache)
    )
    assert describe(job) == ({"damaged image": 2, "no image": 1}, "b")
    pool[0].unlink()
    assert describe(job) == ({"damaged image": 2, "no image": 1}, "b"), "it was in the cache"


def test_truth_is_kept_apart(tmp_path: Path) -> None:
    good = encode(smooth(1))
    told = [{"bad": None, "concept": "x"}, {"bad": "blank"}, {"bad": "copy", "of": "1" * 32}, "odd", {"bad": 3}]
    samples = [{"__key__": str(n), "png": good, "txt": "a", "json": {"truth": said}} for n, said in enumerate(told)]
    pool = pool_of(samples, tmp_path / "pool")
    found, truth = described(pool, EVERY | {"json.truth"})
    assert found["json.truth"].to_list() == [None, None, None, "odd", None]
    assert truth["bad"].to_list() == [None, "blank", "copy", None]
    assert truth["of"].to_list() == [None, None, "1" * 32, None]
    assert set(truth["uid"]) <= set(found["uid"])


def test_a_pool_without_truth_has_none(make_shards: MakeShards) -> None:
    assert described(make_shards(5, 5))[1].height == 0
    assert truth_of(Pool(make_shards(1)).get(0)) == []


def test_an_empty_shard_among_others(make_shards: MakeShards) -> None:
    shards = make_shards(5, 5)
    (shards[0].parent / "shard-00009.tar").write_bytes(bytes(10240))
    assert described([*shards, shards[0].parent / "shard-00009.tar"])[0].height == 10


def curated(tmp_path: Path, samples: list[dict], kept: list[tuple[int, int | None]]) -> list[dict[str, bytes]]:
    """Members of the samples that are written when these (index, caption) pairs are kept."""
    pool = Pool(pool_of(samples, tmp_path / "in"))
    rows = pl.DataFrame(
        [(f"{index:032x}", 0, index, caption) for index, caption in kept],
        schema={"uid": pl.String, "shard": pl.UInt32, "index": pl.UInt32, "caption_index": pl.UInt32},
        orient="row",
    )
    samples_kept = rows.group_by("index", maintain_order=True).agg(
        pl.col("uid", "shard").first(), pl.col("caption_index").alias("captions")
    )
    for job in shard_jobs(pool, samples_kept, tmp_path / "out", ReshardOptions()):
        assert write(job)[1] == {}
    again = Pool(tmp_path / "out")
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
