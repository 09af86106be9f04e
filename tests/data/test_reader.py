"""Pools: one running number over many shards, read from threads and processes, within bounds."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmfoundry.data import reader
from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.reader import Pool, read_sample
from mmfoundry.data.shards import write_shards
from mmfoundry.pipeline.errors import MissingInput

from .conftest import samples

Make = Callable[..., list[Path]]


def _read_key(pool: Pool, number: int) -> str:
    return pool.get(number).members["txt"].decode().split("\n")[0]


def test_numbers_run_through_the_shards(make_shards: Make) -> None:
    pool = Pool(make_shards(25))
    assert len(pool) == 25
    for number, sample in enumerate(samples(25)):
        raw = pool.get(number)
        assert (raw.key, pool.key(number)) == (sample["__key__"], sample["__key__"])
        assert (raw.members["png"], raw.members["txt"]) == (sample["png"], sample["txt"].encode())
        assert raw.shard == pool.shards[number // 10]
    for number in (-1, 25):
        with pytest.raises(IndexError):
            pool.get(number)


def test_only_the_members_asked_for_are_read(make_shards: Make) -> None:
    pool = Pool(make_shards(5))
    assert set(pool.get(2, ["txt", "cls"]).members) == {"txt"}
    index, number = pool.locate(2)
    assert read_sample(index, number, ["json"]).members == {"json": pool.get(2).members["json"]}


def test_a_member_over_the_limit_is_not_read(tmp_path: Path) -> None:
    (shard,) = write_shards([{"__key__": "a", "txt": b"x" * 5000, "json": {}}], tmp_path)
    with pytest.raises(UnreadableSample, match="txt has 5000 > 4999"):
        Pool(shard, max_member_bytes=4999).get(0)
    assert len(Pool(shard, max_member_bytes=5000).get(0).members["txt"]) == 5000
    assert Pool(shard, max_member_bytes=10).get(0, ["json"]).members == {"json": b"{}"}


def test_members_far_apart_come_in_reads_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_JOIN_BYTES", 3000)
    row = {kind: os.urandom(1000 + number) for number, kind in enumerate("abcdef")}
    (shard,) = write_shards([{"__key__": "a", **row}], tmp_path)
    assert Pool(shard).get(0).members == row


def test_a_shard_that_shrinks_or_goes_is_told(make_shards: Make) -> None:
    shards = make_shards(20)
    pool = Pool(shards)
    os.truncate(shards[0], 2000)
    with pytest.raises(UnreadableSample, match="shard changed"):
        pool.get(9)
    shards[1].unlink()
    with pytest.raises(MissingInput, match="is gone"):
        pool.get(15)


def test_threads_share_few_open_shards(make_shards: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_MAX_OPEN_SHARDS", 2)
    pool = Pool(make_shards(40, per_shard=2))
    before = len(os.listdir("/proc/self/fd"))
    numbers = [number * 7 % 40 for number in range(800)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda number: _read_key(pool, number), numbers))
    assert found == [f"picture {number}" for number in numbers]
    assert len(os.listdir("/proc/self/fd")) <= before + 2


_inherited: list[Pool] = []


def _read_inherited(number: int) -> str:
    return _read_key(_inherited[0], number)


def test_processes_forked_from_a_reader_read_on(make_shards: Make) -> None:
    pool = Pool(make_shards(20))
    _read_key(pool, 0)  # its shards are open before the fork
    with multiprocessing.get_context("fork").Pool(2, _inherited.append, (pool,)) as workers:
        found = workers.map(_read_inherited, range(20), chunksize=1)
    assert found == [f"picture {number}" for number in range(20)]


def test_a_pool_has_a_name(make_shards: Make) -> None:
    shards = make_shards(5)
    assert Pool(shards).name == str(shards[0])
    assert Pool(shards[0].parent).name == str(shards[0].parent)
    assert Pool(shards, name="web").name == "web"
