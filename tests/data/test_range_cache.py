"""The disk cache: what was written, within its limit, whoever writes, and whatever happens to its files."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmfoundry.data.range_cache import RangeCache
from mmfoundry.pipeline.errors import ConfigError

BLOCK = 200_000


def _block(number: int) -> bytes:
    return bytes([number % 251]) * 1000 + os.urandom(BLOCK - 2000) + bytes([number % 241]) * 1000


def _files(cache: RangeCache) -> list[Path]:
    return [path for path in (cache.folder / "blocks").rglob("*") if path.is_file()]


def test_any_part_of_a_block_comes_back(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 1 << 20)
    data = _block(1)
    assert cache.read("shard", 3, 0, 10) is None
    assert cache.write("shard", 3, data)
    for start, count in ((0, BLOCK), (0, 1), (65_535, 2), (65_536, 65_536), (BLOCK - 1, 1), (130_000, 7000)):
        assert cache.read("shard", 3, start, count) == data[start : start + count]
    assert cache.read("shard", 3, BLOCK - 1, 2) is None
    assert cache.read("another", 3, 0, 10) is None
    assert RangeCache(tmp_path, 1 << 20).read("shard", 4, 0, 10) is None


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 6 * BLOCK)
    for number in range(5):
        cache.write("shard", number, _block(number))
        (newest,) = [path for path in _files(cache) if path.stat().st_mtime_ns > 10**12]
        os.utime(newest, ns=(number, number))  # long ago, one after the other
    assert cache.read("shard", 0, 0, 1) is not None  # used again
    cache.write("shard", 5, _block(5))
    left = [number for number in range(6) if cache.read("shard", number, 0, 1) is not None]
    assert left == [0, 2, 3, 4, 5]


def test_it_stays_within_its_limit(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 10 * BLOCK)
    most = 0
    for number in range(60):
        assert cache.write("shard", number, _block(number))
        most = max(most, cache.used_bytes())
    assert 8 * BLOCK < most <= 10 * BLOCK
    assert not cache.write("shard", 99, bytes(11 * BLOCK))
    (tmp_path / "locks" / "write").write_bytes(b"abc")  # a count that cannot be read is made anew
    cache.write("shard", 100, _block(1))
    assert cache.used_bytes() <= 10 * BLOCK


def _write_many(folder: str, first: int) -> int:
    cache = RangeCache(folder, 10 * BLOCK)
    most = 0
    for number in range(first, first + 40):
        cache.write("shard", number, _block(number))
        found = cache.read("shard", number, 0, 1000)
        assert found in (None, bytes([number % 251]) * 1000)  # another process may have needed the room
        most = max(most, cache.used_bytes()) if number % 4 == 0 else most
    return most


def test_processes_that_write_at_once_stay_within_it_together(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(3) as workers:
        most = workers.starmap(_write_many, [(str(tmp_path), first) for first in (0, 1000, 2000)], chunksize=1)
    assert max(most) <= 10 * BLOCK
    assert not [path for path in _files(RangeCache(tmp_path, 1)) if path.name.startswith(".")]


@pytest.mark.parametrize("harm", ["flip", "cut", "longer", "empty", "other"])
def test_a_spoiled_block_is_as_none(tmp_path: Path, harm: str) -> None:
    cache = RangeCache(tmp_path, 1 << 20)
    cache.write("shard", 0, _block(0))
    (path,) = _files(cache)
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[-500] ^= 1
    elif harm == "longer":
        data += b"x"
    elif harm == "other":
        data[:8] = b"notours!"
    else:
        del data[len(data) // 2 if harm == "cut" else 0 :]
    path.write_bytes(data)
    assert cache.read("shard", 0, BLOCK - 1000, 1000) is None
    assert not path.exists()
    assert cache.write("shard", 0, _block(0))
    assert cache.read("shard", 0, 0, BLOCK) is not None


def test_a_full_disk_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = RangeCache(tmp_path, 1 << 20)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert not cache.write("shard", 0, _block(0))
    assert cache.read("shard", 0, 0, 1) is None
    assert cache.write("shard", 0, _block(0))


def test_a_folder_that_cannot_be_made_is_told_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"file: the cache .*cache_bytes: 0"):
        RangeCache(tmp_path / "file", 1 << 20)


def test_one_at_a_time_fetches_a_block(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 1 << 20)
    fetched = []

    def fetch(_: int) -> None:
        with cache.fetching("shard", 7):
            if cache.read("shard", 7, 0, 1) is None:
                fetched.append(1)
                time.sleep(0.05)  # as a server would
                cache.write("shard", 7, _block(7))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(fetch, range(32)))
    assert len(fetched) == 1


def _hold(folder: str, ready: "multiprocessing.connection.Connection") -> None:
    with RangeCache(folder, 1 << 20).fetching("shard", 7), RangeCache(folder, 1 << 20)._locked("write"):
        ready.send(True)
        signal.pause()


def test_a_killed_process_holds_nothing_up(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    holder = context.Process(target=_hold, args=(str(tmp_path), there))
    holder.start()
    assert here.recv()
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    cache = RangeCache(tmp_path, 1 << 20)
    with cache.fetching("shard", 7):
        assert cache.write("shard", 7, _block(7))
