"""Remote shards: the same samples as from a disk, from servers that are real, slow, cut connections, and change."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from mmfoundry.data import remote_file
from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.index import index_path
from mmfoundry.data.reader import Pool
from mmfoundry.data.shards import write_shards
from mmfoundry.data.storage import RemoteOptions, ShardFile, Storage
from mmfoundry.pipeline.errors import ConfigError, MissingInput, StorageError

from .servers import WebServer, needs_nginx, nginx, proxy

BLOCK = 1 << 16
PATTERN = "shard-{00000..00001}.tar"


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    """Two shards of 20 samples with bodies of up to 40 KB, about 0.5 MB each."""
    root = tmp_path_factory.mktemp("served")
    noise = os.urandom(1 << 20)
    rows = (
        {"__key__": f"{n:03d}", "bin": noise[n * 999 : n * 999 + 999 * (n % 40) + 5], "txt": f"line {n}"}
        for n in range(40)
    )
    for shard in write_shards(rows, root, max_count=20):
        index_path(shard).unlink()  # an index that was uploaded is believed; here it is made from the headers
    with nginx(root, tmp_path_factory.mktemp("nginx") / "work") as server:
        yield server


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., RemoteOptions]:
    def make(**more: object) -> RemoteOptions:
        given = {"cache_dir": tmp_path / "ranges", "block_bytes": BLOCK, "first_wait_s": 0.01, "max_wait_s": 0.05}
        return RemoteOptions(**given | more)

    return make


def _pool(url: str, folder: Path, options: RemoteOptions) -> Pool:
    return Pool(url, index_dir=folder / "indexes", remote=options)


def _all(pool: Pool) -> list[tuple[str, dict[str, bytes]]]:
    return [(raw.key, raw.members) for raw in map(pool.get, range(len(pool)))]


def _local(web: WebServer) -> list[tuple[str, dict[str, bytes]]]:
    return _all(Pool(web.root, save_index=False))


Options = Callable[..., RemoteOptions]


@needs_nginx
class TestHttp:
    def test_samples_are_those_of_the_disk(self, web: WebServer, tmp_path: Path, options: Options) -> None:
        pool = _pool(web.url(PATTERN), tmp_path, options())
        assert _all(pool) == _local(web)
        assert [shard.name for shard in pool.shards] == ["shard-00000.tar", "shard-00001.tar"]
        assert pool.total_bytes == Pool(web.root, save_index=False).total_bytes
        backwards = [pool.get(number).members for number in reversed(range(len(pool)))]
        assert backwards == [members for _, members in reversed(_local(web))]

    def test_nothing_is_fetched_twice(self, web: WebServer, tmp_path: Path, options: Options) -> None:
        seen = len(web.ranges())
        pool = _pool(web.url(PATTERN), tmp_path, options(read_ahead=0))
        _all(pool)
        asked = web.ranges()[seen:]
        assert len(asked) == len(set(asked))
        with Storage(options(read_ahead=0)).open(pool.shards[0]) as file:  # as another process would
            assert file.read(1000, 100_000) == (web.root / "shard-00000.tar").read_bytes()[1000:101_000]
        assert len(web.ranges()) == seen + len(asked)
        again = _pool(web.url(PATTERN), tmp_path, options(read_ahead=0))
        assert [again.key(number) for number in range(40)] == [key for key, _ in _local(web)]
        assert len(list((tmp_path / "indexes").iterdir())) == 2
        assert len(web.ranges()) == seen + len(asked)

    def test_without_a_cache_only_what_is_asked_for_is_fetched(
        self, web: WebServer, tmp_path: Path, options: Options
    ) -> None:
        pool = _pool(web.url(PATTERN), tmp_path, options(cache_bytes=0))
        index, local = pool.locate(33)
        first, last = index.members(local)[0], index.members(local)[-1]
        seen = len(web.ranges())
        assert pool.get(33).members == _local(web)[33][1]
        assert web.ranges()[seen:] == [("shard-00001.tar", first.offset, last.offset + last.size - 1)]
        assert not (tmp_path / "ranges").exists()

    def test_a_reader_in_sequence_is_read_ahead(self, web: WebServer, options: Options) -> None:
        with Storage(options()).open(web.url("shard-00001.tar")) as file:
            seen = len(web.ranges())
            for offset in (0, 1000, 2000):
                file.read(offset, 1000)
            _until(lambda: len(web.ranges()) >= seen + 5)  # its own block, and four that were not asked for
            assert {first // BLOCK for _, first, _ in web.ranges()[seen:]} == {0, 1, 2, 3, 4}

    @pytest.mark.parametrize("after", [0, 1, 700, 30_000])
    def test_cut_connections_cost_no_sample(self, web: WebServer, tmp_path: Path, options: Options, after: int) -> None:
        few = 1 << 30 if after == 30_000 else 5  # the last cuts every connection there is
        with proxy(web.port, after, few) as port:
            url = f"http://127.0.0.1:{port}/{PATTERN}"
            assert _all(_pool(url, tmp_path, options())) == _local(web)

    def test_what_came_before_a_cut_is_kept(self, web: WebServer, options: Options) -> None:
        whole = (web.root / "shard-00000.tar").read_bytes()
        with proxy(web.port, 30_000) as port:
            file = Storage(options(cache_bytes=0)).open(f"http://127.0.0.1:{port}/shard-00000.tar")
            seen = len(web.ranges())
            assert file.read(5000, 200_000) == whole[5000:205_000]
        starts = sorted(first for _, first, last in web.ranges()[seen:] if last == 204_999)
        assert starts[0] == 5000
        assert len(starts) > 5
        assert all(later > sooner + 20_000 for sooner, later in pairwise(starts))

    def test_a_connection_that_says_nothing_more_is_given_up(
        self, web: WebServer, tmp_path: Path, options: Options
    ) -> None:
        with proxy(web.port, 20_000, 2, "stall") as port:
            url = f"http://127.0.0.1:{port}/shard-00000.tar"
            assert _all(_pool(url, tmp_path, options(stall_s=1.0))) == _local(web)[:20]

    def test_a_slow_server_is_waited_for(self, web: WebServer, tmp_path: Path, options: Options) -> None:
        url = web.url("slow/shard-00001.tar")  # longer than stall_s in all, never without a byte for it
        assert _all(_pool(url, tmp_path, options(stall_s=1.5))) == _local(web)[20:]

    def test_waits_double_and_end(self, web: WebServer, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
        waits: list[float] = []
        with monkeypatch.context() as patched:  # not for longer: the reading of the server's log sleeps as well
            patched.setattr(remote_file.time, "sleep", waits.append)
            with pytest.raises(StorageError, match=r"busy/busy\.tar: 6 attempts failed \(.*503.*run again"):
                Storage(options(attempts=6, first_wait_s=1.0, max_wait_s=5.0)).open(web.url("busy/busy.tar"))
        assert [status for name, status, _, _ in web.requests() if name == "busy.tar"] == [503] * 6
        for wait, most in zip(waits, (1, 2, 4, 5, 5), strict=True):
            assert most / 2 <= wait <= most

    def test_what_cannot_be_read_is_told_at_once(
        self, web: WebServer, tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remote_file.time, "sleep", lambda _: pytest.fail("it waits"))
        with pytest.raises(MissingInput, match=r"none\.tar"):
            _pool(web.url("none.tar"), tmp_path, options())
        with pytest.raises(StorageError, match="access is refused"):
            _pool(web.url("refused/a.tar"), tmp_path, options())
        with pytest.raises(StorageError, match=r"no ranges of bytes.*as a stream"):
            _pool(web.url("whole/shard-00000.tar"), tmp_path, options())
        with pytest.raises(ConfigError, match=r"ftp://host/a\.tar: shards are read from http"):
            Storage(options()).open("ftp://host/a.tar")

    def test_secrets_in_a_url_are_not_shown(self, web: WebServer, options: Options) -> None:
        url = f"http://user:secret@127.0.0.1:{web.port}/none.tar?signature=secret"
        with pytest.raises(MissingInput) as found:
            Storage(options()).open(url)
        assert "none.tar" in str(found.value)
        assert "secret" not in str(found.value)

    def test_a_pool_is_named_without_the_secrets_of_its_url(
        self, web: WebServer, tmp_path: Path, options: Options
    ) -> None:
        plain = web.url("shard-00000.tar")
        url = plain.replace("http://", "http://user:secret@") + "?signature=secret"
        for name in ("", url):
            pool = Pool(url, name=name, index_dir=tmp_path / "indexes", remote=options())
            assert pool.name == pool.skip(0, UnreadableSample("no image")).source == plain
        assert Pool([url], index_dir=tmp_path / "indexes", remote=options()).name == plain

    def test_a_shard_that_changes_is_noticed(self, web: WebServer, tmp_path: Path, options: Options) -> None:
        folder = web.root / "changing"
        write_shards([{"__key__": f"{n}", "bin": b"old" * 30_000} for n in range(9)], folder)
        url = web.url("changing/shard-00000.tar")
        pool = _pool(url, tmp_path, options(cache_bytes=0))
        assert pool.get(3).members["bin"] == b"old" * 30_000
        write_shards([{"__key__": f"{n}", "bin": b"new" * 30_000} for n in range(9)], folder)
        os.utime(folder / "shard-00000.tar", (1, 1))  # same size; its time of change tells
        for number in (3, 7):
            with pytest.raises(UnreadableSample, match="shard changed"):
                pool.get(number)
        assert _pool(url, tmp_path, options()).get(3).members["bin"] == b"new" * 30_000

    def test_a_shard_that_is_gone_is_told(self, web: WebServer, tmp_path: Path, options: Options) -> None:
        (shard,) = write_shards([{"__key__": f"{n}", "bin": b"x" * 90_000} for n in range(9)], web.root / "going")
        pool = _pool(web.url("going/shard-00000.tar"), tmp_path, options(cache_bytes=0))
        shard.unlink()
        with pytest.raises(MissingInput, match=r"going/shard-00000\.tar"):
            pool.get(8)

    def test_threads_fetch_each_block_once(self, web: WebServer, tmp_path: Path, options: Options) -> None:
        _pool(web.url(PATTERN), tmp_path, options())
        pool = _pool(web.url(PATTERN), tmp_path, options(cache_dir=tmp_path / "fresh", read_ahead=0))
        seen = len(web.ranges())
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(pool.get, [number * 7 % 40 for number in range(200)]))
        assert all(raw.members == _local(web)[int(raw.key)][1] for raw in found[:40])
        asked = web.ranges()[seen:]
        assert len(asked) == len(set(asked)) > 10

    def test_processes_share_the_cache(self, web: WebServer, tmp_path: Path, options: Options) -> None:
        pool = _pool(web.url("shard-00000.tar"), tmp_path, options(cache_dir=tmp_path / "fresh", read_ahead=0))
        _all(pool)
        _clear(tmp_path / "fresh")
        seen = len(web.ranges())
        with multiprocessing.get_context("spawn").Pool(2) as workers:
            for found in workers.map(_all, [pool, pool], chunksize=1):
                assert found == _local(web)[:20]
        asked = web.ranges()[seen:]
        assert len(asked) == len(set(asked)) == 4

    def test_a_forked_process_reads_on(self, web: WebServer, tmp_path: Path, options: Options) -> None:
        pool = _pool(web.url("shard-00000.tar"), tmp_path, options(cache_bytes=0, read_ahead=0))
        pool.get(0)  # connections and their thread are there before the fork
        with multiprocessing.get_context("fork").Pool(1, _inherited.append, (pool,)) as workers:
            assert workers.apply(_read_inherited, (7,)) == _local(web)[7]
        assert pool.get(8).key == "008"


_inherited: list[Pool] = []


def _read_inherited(number: int) -> tuple[str, dict[str, bytes]]:
    raw = _inherited[0].get(number)
    return raw.key, raw.members


def _clear(folder: Path) -> None:
    for path in (folder / "blocks").rglob("*"):
        if path.is_file():
            path.unlink()


def _until(true: Callable[[], bool], patience_s: float = 60) -> None:
    ends = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_local_files_go_through_the_same_door(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(range(200)))
    before = len(os.listdir("/proc/self/fd"))
    with Storage().open(tmp_path / "a.tar") as file:
        assert isinstance(file, ShardFile)
        assert (file.size, file.read(10, 5), file.read(198, 5), file.read(300, 5)) == (
            200,
            bytes(range(10, 15)),
            b"\xc6\xc7",
            b"",
        )
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(MissingInput, match="no such shard"):
        Storage().open(tmp_path / "b.tar")


@pytest.mark.parametrize(
    "wrong", [{"cache_bytes": -1}, {"block_bytes": 100}, {"attempts": 0}, {"read_ahead": -1}, {"stall_s": 0}]
)
def test_options_that_cannot_be_meant_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RemoteOptions(**wrong)
