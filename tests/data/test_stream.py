"""Streams: shards that have no index, and a position that is weaker, and says so."""

import bz2
import gzip
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmfoundry.data.index import open_index
from mmfoundry.data.reader import Pool
from mmfoundry.data.stream import Stream
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput, StorageError, TooManyUnreadable

from .servers import needs_nginx, nginx, proxy

Make = Callable[..., list[Path]]


def _keys(stream: Stream) -> list[str]:
    return [raw.key for raw in stream]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, bytes])
def test_compressed_shards_give_what_plain_ones_give(
    make_shards: Make, tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    shards = make_shards(20)
    for shard in shards:
        (tmp_path / f"{shard.name}.packed").write_bytes(pack(shard.read_bytes()))
    pool = Pool(shards)
    found = list(Stream(tmp_path / "shard-{00000..00001}.tar.packed", spool_dir=tmp_path))
    assert [(raw.key, raw.members) for raw in found] == [(pool.key(n), pool.get(n).members) for n in range(20)]
    assert {raw.shard.name for raw in found} == {f"{shard.name}.packed" for shard in shards}
    assert not list(tmp_path.glob("mmfoundry-stream-*"))


def test_each_epoch_has_its_order_and_each_rank_its_shards(make_shards: Make) -> None:
    shards = make_shards(40)
    streams = [Stream(shards, seed=5, rank=rank, world_size=2) for rank in range(2)]
    first, second = ([key for stream in streams for key in _keys(stream)] for _ in range(2))
    assert sorted(first) == sorted(second) == [f"{n:06d}" for n in range(40)]
    assert first != second != sorted(first)
    assert [key for rank in range(2) for key in _keys(Stream(shards, seed=5, rank=rank, world_size=2))] == first
    assert _keys(Stream(shards)) == sorted(first)
    assert streams[0].tally.drawn == 40


@pytest.mark.parametrize("stop", [1, 9, 10, 11, 19, 25])
def test_a_stream_goes_on_where_it_was(make_shards: Make, stop: int) -> None:
    shards = make_shards(30)
    whole = Stream(shards, seed=1)
    expected = _keys(whole) + _keys(whole)
    stream = Stream(shards, seed=1)
    before = [raw.key for _, raw in zip(range(stop), stream, strict=False)]
    resumed = Stream(shards, seed=1)
    resumed.load_state_dict(stream.state_dict())
    assert before + _keys(resumed) + _keys(resumed) == expected


def test_a_position_is_of_these_ranks_and_shards(make_shards: Make) -> None:
    shards = make_shards(40)
    state = Stream(shards, seed=1, rank=0, world_size=2).state_dict()
    for other in (
        Stream(shards, seed=1, rank=1, world_size=2),
        Stream(shards, seed=1),
        Stream(shards, seed=2, rank=0, world_size=2),
        Stream(shards[:3], seed=1, rank=0, world_size=2),
    ):
        with pytest.raises(ConfigError, match=r"another (rank|world_size|seed|shards)"):
            other.load_state_dict(state)
    with pytest.raises(ConfigError, match="a shard for each rank"):
        Stream(shards, rank=0, world_size=5)


def test_a_shard_that_lost_samples_is_not_gone_on_with(make_shards: Make) -> None:
    (shard,) = make_shards(10)
    stream = Stream(shard)
    for number, _ in enumerate(stream):
        if number == 7:
            break
    shard.write_bytes(make_shards(3)[0].read_bytes())
    with pytest.raises(DamagedInput, match="has 3 samples"):
        _keys(stream)


def test_commands_are_refused_unless_allowed(make_shards: Make, tmp_path: Path) -> None:
    make_shards(20)
    folder = next(tmp_path.glob("shards-*"))
    command = f"pipe:cat {folder}/shard-{{00000..00001}}.tar"
    with pytest.raises(ConfigError, match="allow_pipe"):
        Stream(command)
    with pytest.raises(ConfigError, match="command"):
        Pool(command)
    stream = Stream(command, allow_pipe=True)
    assert stream.shards == [f"pipe:cat {folder}/shard-0000{n}.tar" for n in range(2)]
    assert _keys(stream) == [f"{n:06d}" for n in range(20)]


@pytest.mark.parametrize("command", ["cat a | tar x", "cat a > b", "cat 'a", "", "a && b"])
def test_there_is_no_shell(command: str) -> None:
    with pytest.raises(ConfigError, match="pipe:"):
        Stream(f"pipe:{command}", allow_pipe=True)


def test_words_for_a_shell_stay_words(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="code"):
        _keys(Stream(f"pipe:cat $(touch${{IFS}}{tmp_path}/made) ;touch {tmp_path}/made", allow_pipe=True))
    assert not (tmp_path / "made").exists()


def test_a_command_that_fails_stops_the_run(make_shards: Make, tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import sys; sys.stdout.write('x' * 5000); sys.exit('no such bucket')")
    with pytest.raises(StorageError, match="ended with code 1: no such bucket"):
        _keys(Stream(f"pipe:{sys.executable} {script}", allow_pipe=True))
    with pytest.raises(StorageError, match="cannot be run"):
        _keys(Stream("pipe:/none/such-command x", allow_pipe=True))


def test_a_stream_without_end_is_cut_short() -> None:
    with pytest.raises(StorageError, match=r"pipe:yes: more than 1000000 bytes"):
        _keys(Stream("pipe:yes", allow_pipe=True, max_shard_bytes=1_000_000))


def test_a_small_file_that_unpacks_to_a_large_one_is_cut_short(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(50_000_000)))
    with pytest.raises(StorageError, match=r"a\.tar\.gz: more than 1000000 bytes"):
        _keys(Stream(tmp_path / "a.tar.gz", max_shard_bytes=1_000_000))


def test_damage_costs_what_it_hits_and_is_counted(make_shards: Make, tmp_path: Path) -> None:
    (shard,) = make_shards(10)
    data = bytearray(shard.read_bytes())
    data[open_index(shard).members(4)[1].offset - 509] ^= 1
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(data)))
    stream = Stream(tmp_path / "a.tar.gz", max_unreadable=1.0, skip_log=tmp_path / "skips.jsonl")
    assert _keys(stream) == [f"{n:06d}" for n in range(10) if n != 4]
    assert {reason for _, reason in stream.tally.counts} >= {"damaged header"}
    assert "000004" in (tmp_path / "skips.jsonl").read_text()
    with pytest.raises(TooManyUnreadable):
        _keys(Stream(tmp_path / "a.tar.gz", max_unreadable=0))


def test_a_packed_shard_that_is_cut_gives_what_is_there(make_shards: Make, tmp_path: Path) -> None:
    (shard,) = make_shards(10)
    packed = gzip.compress(shard.read_bytes())
    (tmp_path / "a.tar.gz").write_bytes(packed[: len(packed) // 2])
    stream = Stream(tmp_path / "a.tar.gz", max_unreadable=1.0)
    keys = _keys(stream)
    assert 1 <= len(keys) < 10
    assert keys == [f"{n:06d}" for n in range(len(keys))]
    assert any(reason == "cut off" for _, reason in stream.tally.counts)


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no such shard"):
        Stream(tmp_path / "none.tar.gz")
    with pytest.raises(MissingInput, match="in this folder"):
        Stream(tmp_path)
    (tmp_path / "a.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd rest")
    with pytest.raises(DamagedInput, match="pipe:zstd -dc"):
        _keys(Stream(tmp_path / "a.tar.zst"))


@needs_nginx
@pytest.mark.parametrize("place", ["", "whole/"])
def test_servers_with_and_without_ranges(make_shards: Make, tmp_path: Path, place: str) -> None:
    from mmfoundry.data.storage import RemoteOptions

    (shard,) = make_shards(10)
    (tmp_path / "served").mkdir()
    noise = os.urandom(300_000)  # behind the end marker, so that the file is long enough to be cut
    (tmp_path / "served" / "a.tar.gz").write_bytes(gzip.compress(shard.read_bytes()) + gzip.compress(bytes(10240)))
    (tmp_path / "served" / "b.tar").write_bytes(shard.read_bytes() + noise)
    quick = RemoteOptions(first_wait_s=0.01)
    with nginx(tmp_path / "served", tmp_path / "nginx") as web, proxy(web.port, 100_000, 3) as port:
        url = f"http://127.0.0.1:{port}/{place}"
        for name in ("a.tar.gz", "b.tar"):
            found = _keys(Stream(url + name, remote=quick, max_unreadable=1.0))
            assert found == [f"{n:06d}" for n in range(10)]
        with pytest.raises(MissingInput, match=r"none\.tar"):
            _keys(Stream(url + "none.tar", remote=quick))
        statuses = {status for name, status, _, _ in web.requests() if name == "b.tar"}
    assert statuses == ({200} if place else {206})
