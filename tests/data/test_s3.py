"""Shards in a bucket: moto's S3 server, through s3fs."""

import os
from pathlib import Path
from typing import Any

import pytest

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.loader import Loader, Source
from mmfoundry.data.reader import Pool
from mmfoundry.data.shards import write_shards
from mmfoundry.data.storage import RemoteOptions
from mmfoundry.pipeline.errors import MissingInput, StorageError

from .conftest import samples
from .servers import proxy, s3_server


def _options(tmp_path: Path, **more: Any) -> RemoteOptions:
    return RemoteOptions(cache_dir=tmp_path / "ranges", block_bytes=1 << 14, first_wait_s=0.01, **more)


def _pool(tmp_path: Path, shards: Any, **more: Any) -> Pool:
    return Pool(shards, index_dir=tmp_path / "indexes", remote=_options(tmp_path, **more))


def _fill(bucket: Any, folder: Path, count: int = 20) -> Pool:
    local = write_shards(samples(count), folder, max_count=10)
    for shard in local:
        bucket.put_file(str(shard), f"shards/pool/{shard.name}")
    return Pool(local)


@pytest.mark.parametrize(
    "named", ["s3://shards/pool", "s3://shards/pool/*.tar", "s3://shards/pool/shard-{00000..00001}.tar"]
)
def test_samples_are_those_of_the_disk(bucket: Any, tmp_path: Path, named: str) -> None:
    local = _fill(bucket, tmp_path / "local")
    pool = _pool(tmp_path, named)
    assert len(pool) == 20
    for number in (3, 19, 0, 11):
        mine, theirs = pool.get(number), local.get(number)
        assert (mine.key, mine.members) == (theirs.key, theirs.members)
        assert str(mine.shard) == f"s3://shards/pool/shard-0000{number // 10}.tar"


def test_batches_are_those_of_the_disk(bucket: Any, tmp_path: Path) -> None:
    local = _fill(bucket, tmp_path / "local")

    def keys(pool: Pool) -> list[list[str]]:
        loader = Loader([Source(pool)], batch_size=4, encode=lambda sample, _: {"key": sample.key}, seed=3)
        return [batch["key"] for batch, _ in zip(loader, range(12), strict=False)]

    assert keys(_pool(tmp_path, "s3://shards/pool")) == keys(local)


def test_an_object_that_is_replaced_is_noticed(bucket: Any, tmp_path: Path) -> None:
    _fill(bucket, tmp_path / "local")
    pool = _pool(tmp_path, "s3://shards/pool", cache_bytes=0)
    pool.get(3)
    data = bytearray((tmp_path / "local" / "shard-00000.tar").read_bytes())
    data[Pool(tmp_path / "local").indexes[0].members(3)[0].offset] ^= 1
    bucket.pipe_file("shards/pool/shard-00000.tar", bytes(data))
    with pytest.raises(UnreadableSample, match="shard changed"):
        pool.get(3)
    assert _pool(tmp_path, "s3://shards/pool").get(3).members != Pool(tmp_path / "local").get(3).members


def test_what_is_not_there_is_told(bucket: Any, tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"s3://shards/none\.tar"):
        _pool(tmp_path, "s3://shards/none.tar")
    with pytest.raises(MissingInput, match=r"no \*.tar"):
        _pool(tmp_path, "s3://shards/none")


def test_who_has_no_credentials_is_told_at_once(
    bucket: Any, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    def never(seconds: float) -> None:
        raise AssertionError("waits, though every attempt would meet the same")

    _fill(bucket, tmp_path / "local")
    for name in [*os.environ]:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})
    monkeypatch.setattr("mmfoundry.data.remote_file.time.sleep", never)
    with pytest.raises(
        StorageError, match=r"s3://shards/pool/shard-00000\.tar: access is refused \(NoCredentialsError"
    ):
        _pool(tmp_path, "s3://shards/pool/shard-00000.tar")


def test_cut_connections_cost_no_sample(
    bucket: Any, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    local = _fill(bucket, tmp_path / "local")
    with proxy(int(endpoint.rpartition(":")[2]), 3000, 6) as port:
        settings = {"key": "any", "secret": "any", "endpoint_url": f"http://127.0.0.1:{port}"}
        monkeypatch.setitem(fsspec.config.conf, "s3", settings)
        pool = _pool(tmp_path, "s3://shards/pool/shard-{00000..00001}.tar")
        assert [pool.get(n).members for n in range(20)] == [local.get(n).members for n in range(20)]


def test_a_server_that_dies_stops_the_reader(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    with s3_server() as url:
        settings: dict[str, Any] = {"key": "any", "secret": "any", "endpoint_url": url}
        settings["config_kwargs"] = {"retries": {"max_attempts": 0}, "connect_timeout": 5}  # botocore's own
        monkeypatch.setitem(fsspec.config.conf, "s3", settings)
        system = fsspec.filesystem("s3", use_listings_cache=False)
        system.mkdir("shards")
        _fill(system, tmp_path / "local")
        pool = _pool(tmp_path, "s3://shards/pool", cache_bytes=0, read_ahead=0, attempts=2)
        pool.get(3)
    with pytest.raises(StorageError, match="2 attempts failed"):
        pool.get(4)
