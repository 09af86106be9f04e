"""data/near_rows.py: parts, files and worker processes find what is found in memory."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mmfoundry.data import hamming, near_rows
from mmfoundry.data.crew import Crew, alone
from mmfoundry.data.executors import LocalExecutor
from mmfoundry.data.hamming import Nearness, leaders
from mmfoundry.data.near_rows import CodedRows

MINHASH = Nearness(12, 64, place_bits=16)
HASH = Nearness(28, 512)


def drawn(nearness: Nearness, count: int) -> np.ndarray:
    """Codes of which half are copies of a few, on both sides of the radius; some are equal."""
    rng = np.random.default_rng(0)
    kind = np.dtype(np.uint16) if nearness.place_bits == 16 else np.dtype(np.uint8)
    width = nearness.num_words * 8 // kind.itemsize
    codes = rng.integers(0, 2 ** (8 * kind.itemsize), (count, width)).astype(kind)
    few = codes[rng.integers(0, 20, count)]
    other = rng.random((count, width)) < rng.choice([0.0, 0.05, 0.12, 0.25], count)[:, None]
    copies = np.where(other, few ^ (1 << rng.integers(0, 8, (count, width))).astype(kind), few)
    return np.where(rng.random(count)[:, None] < 0.5, copies, codes).view(np.uint64)


def coded(codes: np.ndarray) -> CodedRows:
    """Parts of different sizes, one of them empty."""
    table = pl.DataFrame({"code": codes, "number": np.arange(len(codes))})
    cuts = [0, 5, 5, len(codes) // 3, len(codes)]
    parts = [table[start:stop].lazy() for start, stop in pairwise(cuts)]
    return CodedRows(parts, "code", lambda column: column.to_numpy())


@pytest.mark.parametrize("nearness", [MINHASH, HASH])
@pytest.mark.parametrize("many", [0, 10**6])
def test_workers_find_what_is_found_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nearness: Nearness, many: int
) -> None:
    monkeypatch.setattr(hamming, "MANY", many)
    monkeypatch.setattr(hamming, "_FIRST", 100)
    codes = drawn(nearness, 3000)
    order = np.random.default_rng(1).permutation(3000)[:2900]
    expected = leaders(codes[order], nearness)
    assert 1000 < expected.sum() < 2500
    rows = coded(codes)
    names, marks = rows.named(["number"])
    assert names["number"].to_list() == list(range(3000))
    with alone() as crew:
        assert rows.leaders(order, marks, nearness, crew).tolist() == expected.tolist()
        assert not list(crew.folder.iterdir()), "of few rows, files would cost more than they save"
    monkeypatch.setattr(near_rows, "SHARED", 50)
    with alone() as crew:
        assert rows.leaders(order, marks, nearness, crew).tolist() == expected.tolist()
    with LocalExecutor(2) as executor:
        crew = Crew(tmp_path / "merge", executor)
        assert rows.leaders(order, marks, nearness, crew).tolist() == expected.tolist()
    assert len(list(crew.folder.glob("pairs-*.parquet"))) >= 2 * nearness.num_bands(2900)


def test_no_rows() -> None:
    rows = CodedRows([pl.DataFrame({"code": np.empty((0, 8), np.uint64)}).lazy()], "code", lambda c: c.to_numpy())
    with alone() as crew:
        assert rows.leaders(np.empty(0, np.int64), np.empty(0, np.uint64), HASH, crew).tolist() == []
