"""data/filters/subset.py against the way DataComp's baselines write their subsets and its resharder looks them up."""

import random
from pathlib import Path

import numpy as np
import pytest

from mmfoundry.data.filters.subset import read_subset, to_subset, write_subset
from mmfoundry.pipeline.errors import DamagedInput

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


@pytest.mark.parametrize("uid", ["", "0" * 31, "0" * 33, "A" * 32, "0x" + "0" * 30, "g" * 32, " " + "0" * 31])
def test_not_a_uid(uid: str) -> None:
    with pytest.raises(ValueError, match="uid"):
        to_subset([uid])


@pytest.mark.parametrize("content", [b"", b"not numpy", b"\x93NUMPY\x01\x00"])
def test_not_a_subset(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "subset.npy").write_bytes(content)
    with pytest.raises(DamagedInput, match=r"subset\.npy"):
        read_subset(tmp_path / "subset.npy")


def test_another_type_of_array(tmp_path: Path) -> None:
    np.save(tmp_path / "subset.npy", np.zeros(3))
    with pytest.raises(DamagedInput, match="u8,u8"):
        read_subset(tmp_path / "subset.npy")
