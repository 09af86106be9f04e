"""data/table_cache.py: what is there is whole."""

from pathlib import Path

import polars as pl
import pytest

from mmfoundry.data.table_cache import TableCache
from mmfoundry.pipeline.errors import NotEnoughSpace

TABLE = pl.DataFrame({"a": [1, 2, 3], "b": ["x", None, "z"]})


@pytest.mark.parametrize(("kind", "suffix"), [("partial", ".arrow"), ("derived", ".arrow"), ("table", ".parquet")])
@pytest.mark.parametrize("columns", [["a"], ["a", "b"]])
def test_what_was_put_is_had(tmp_path: Path, kind: str, suffix: str, columns: list[str]) -> None:
    cache = TableCache(tmp_path)
    path = cache.path(kind, "abc", "0")
    assert path.suffix == suffix
    table = TABLE.select(columns)
    assert (cache.get(path), cache.has(path)) == (None, False)
    cache.put(path, table)
    found = cache.get(path)
    assert cache.has(path)
    assert found is not None
    assert found.equals(table)
    assert cache.scan(path).select("a").collect().equals(table.select("a"))
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("damage", ["cut", "altered", "no digest", "empty digest"])
def test_what_is_not_whole_is_not_there(tmp_path: Path, damage: str) -> None:
    cache = TableCache(tmp_path)
    path = cache.path("state", "abc", "0")
    cache.put(path, TABLE)
    digest = path.with_suffix(".sha256")
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "altered":
        path.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    elif damage == "no digest":
        digest.unlink()
    else:
        digest.write_bytes(b"\xff")
    assert (cache.get(path), cache.has(path)) == (None, False)
    cache.put(path, TABLE)
    assert cache.has(path)


@pytest.mark.parametrize("kind", ["partial", "table"])
def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise pl.exceptions.ComputeError("No space left on device (os error 28)")

    for name in ("write_ipc", "write_parquet"):
        monkeypatch.setattr(pl.DataFrame, name, full)
    cache = TableCache(tmp_path)
    with pytest.raises(NotEnoughSpace, match="no space left for it; free some"):
        cache.put(cache.path(kind, "abc", "0"), TABLE)
    assert not list(tmp_path.rglob("*.*"))


def test_what_others_wrote_is_sealed(tmp_path: Path) -> None:
    cache = TableCache(tmp_path)
    path = cache.path("scores", "abc", "0")
    path.parent.mkdir(parents=True)
    TABLE.write_parquet(path)
    assert not cache.has(path)
    cache.seal(path)
    assert cache.has(path)


def test_what_nobody_asked_for_goes(tmp_path: Path) -> None:
    import os

    cache = TableCache(tmp_path)
    paths = [cache.path("table", "abc", "old"), *(cache.path("state", "abc", name) for name in ("a", "b", "new"))]
    for path in paths[:3]:
        cache.put(path, TABLE)
        os.utime(path, (100, 100))
    cache.get(paths[1])
    cache.has(paths[2])
    cache.put(paths[3], TABLE)
    left = cache.drop_unused(since=200)
    assert [path.exists() for path in paths] == [False, True, True, True]
    assert not paths[0].with_suffix(".sha256").exists()
    assert left == sum(path.stat().st_size for path in paths[1:])
