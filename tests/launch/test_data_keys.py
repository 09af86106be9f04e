"""`data keys`: what is in shards, and which of it a rank gets."""

import shutil
from pathlib import Path

import pytest

from mmfoundry.data.inspect import iter_keys
from tests.launch.conftest import Command

SAMPLES = Path(__file__).resolve().parents[2] / "data" / "samples"


@pytest.fixture
def shards(here: Path) -> Path:
    """Two shards of unequal sizes."""
    (here / "shards").mkdir()
    for name in ("pictures-noto-00000.tar", "pool-00000.tar"):
        shutil.copy(SAMPLES / name, here / "shards" / name)
    return here / "shards"


def test_ranks_print_exactly_the_positions_asked_for(quick: Command, shards: Path) -> None:
    everything = quick("data", "keys", "shards").stdout.splitlines()
    whole = quick("data", "keys", "shards", "--seed", "4", "--epoch", "1").stdout.splitlines()
    assert whole != everything
    assert sorted(whole) == sorted(everything)  # one epoch, to its end
    words = ["data", "keys", "shards", "--seed", "4", "--epoch", "1", "--world-size", "3", "--start", "20"]
    parts = [quick(*words, "--rank", str(rank), "--count", "7").stdout.splitlines() for rank in range(3)]
    assert [part[place] for place in range(7) for part in parts] == whole[20:41]
    rest = [quick(*words, "--rank", str(rank)).stdout.splitlines() for rank in range(3)]
    assert sorted(key for part in rest for key in part) == sorted(whole[20:])


def test_a_window_is_that_of_the_loader(quick: Command, shards: Path) -> None:
    narrow = quick("data", "keys", "shards", "--window", "256", "--count", "40").stdout.splitlines()
    assert narrow == list(iter_keys(shards, window=256, count=40))
    assert narrow != quick("data", "keys", "shards", "--count", "40").stdout.splitlines()


def test_numbers_out_of_range_are_refused(quick: Command, shards: Path) -> None:
    done = quick("data", "keys", "shards", "--rank", "2", "--world-size", "2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: rank 2 of world size 2")
    assert "window is 5; it needs at least 256" in quick("data", "keys", "shards", "--window", "5").stderr
    assert quick("data", "keys", "shards", "--start", "-1").returncode == 2
