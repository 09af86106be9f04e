"""data/filters/subset.py against the way DataComp's baselines write their subsets and its resharder looks them up."""

import random
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfoundry.data.filters.subset import (
    is_sorted,
    load_subset,
    pairs_of,
    read_subset,
    times_in,
    to_subset,
    uids_of,
    write_subset,
)
from mmfoundry.pipeline.errors import DamagedInput, MissingInput

UIDS = [f"{random.Random(7).getrandbits(128) >> shift:032x}" for shift in (0, 1, 3, 60, 64, 100, 127)]


def test_format_is_datacomps(tmp_path: Path) -> None:
    write_subset(UIDS, tmp_path / "subset.npy")
    # as the baselines do: halves of the hex digits, numpy's own sort of the pairs
    expected = np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in UIDS], np.dtype("u8,u8"))
    expected.sort()
    for mode in (None, "r"):  # the resharder maps the file
        found = np.load(tmp_path / "subset.npy", mmap_mode=mode)
        assert found.dtype == np.dtype("u8,u8")
        assert (found == expected).all()
    assert read_subset(tmp_path / "subset.npy") == sorted(UIDS)


def test_repeated_uids_stay_repeated() -> None:
    assert len(to_subset([UIDS[0]] * 3)) == 3
    assert len(to_subset([])) == 0


# halves that meet, so that ties in the first and order in the second are drawn
HALVES = st.sampled_from([0, 1, 2, 2**63 - 1, 2**63, 2**64 - 1])
SOME_UIDS = st.lists(st.builds(lambda high, low: f"{high:016x}{low:016x}", HALVES, HALVES), max_size=30)


@given(uids=SOME_UIDS, asked=SOME_UIDS)
def test_whole_columns_are_as_one_by_one(uids: list[str], asked: list[str]) -> None:
    expected = [(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids]
    assert pairs_of(uids).tolist() == pairs_of(pl.Series(uids, dtype=pl.String)).tolist() == expected
    assert uids_of(pairs_of(uids)).to_list() == uids
    subset = to_subset(uids)
    assert subset.tolist() == to_subset(pairs_of(uids)).tolist() == sorted(expected)
    assert is_sorted(subset)
    assert is_sorted(pairs_of(uids)) == (expected == sorted(expected))
    assert times_in(subset, asked).tolist() == [uids.count(uid) for uid in asked]


def test_longer_than_what_is_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfoundry.data.filters.subset._AT_ONCE", 3)
    assert uids_of(pairs_of(UIDS)).to_list() == UIDS
    ordered = sorted(UIDS)
    assert is_sorted(pairs_of(ordered))
    for place in range(len(UIDS) - 1):
        swapped = [*ordered[:place], ordered[place + 1], ordered[place], *ordered[place + 2 :]]
        assert not is_sorted(pairs_of(swapped))


@pytest.mark.parametrize(
    "uid", ["", "0" * 31, "0" * 33, "A" * 32, "0x" + "0" * 30, "g" * 32, " " + "0" * 31, "0" * 32 + "\n", "٣" * 32]
)
def test_not_a_uid(uid: str) -> None:
    for uids in ([uid], [UIDS[0], uid], pl.Series([uid])):
        with pytest.raises(ValueError, match="uid"):
            to_subset(uids)


def test_no_uid_at_all() -> None:
    with pytest.raises(ValueError, match="uid"):
        to_subset(pl.Series([UIDS[0], None]))


@pytest.mark.parametrize("content", [b"", b"not numpy", b"\x93NUMPY\x01\x00"])
def test_not_a_subset(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "subset.npy").write_bytes(content)
    with pytest.raises(DamagedInput, match=r"subset\.npy"):
        read_subset(tmp_path / "subset.npy")


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((2, 2), "u8,u8"), np.zeros(2, "i8,i8")])
def test_another_type_of_array(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "subset.npy", array)
    with pytest.raises(DamagedInput, match="u8,u8"):
        load_subset(tmp_path / "subset.npy")


def test_an_archive(tmp_path: Path) -> None:
    with open(tmp_path / "subset.npy", "wb") as file:
        np.savez(file, a=np.zeros(3))
    with pytest.raises(DamagedInput, match="u8,u8"):
        load_subset(tmp_path / "subset.npy")


def test_an_empty_subset(tmp_path: Path) -> None:
    write_subset([], tmp_path / "subset.npy")
    empty = load_subset(tmp_path / "subset.npy")
    assert (len(empty), is_sorted(empty), times_in(empty, UIDS[:1]).tolist()) == (0, True, [0])
    assert read_subset(tmp_path / "subset.npy") == []


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"subset\.npy"):
        load_subset(tmp_path / "subset.npy")
