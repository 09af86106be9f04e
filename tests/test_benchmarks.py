"""The loader benchmark runs, on tiny pictures and without peers: those want a network, and minutes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.scripts import BENCHMARKS, load_script

SCRIPT = BENCHMARKS / "loader.py"


@pytest.fixture(scope="module")
def loader() -> ModuleType:
    return load_script("loader")


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """Smooth, as photographs are: what is cut from them is small when encoded."""
    ramp = np.add.outer(np.arange(300), np.arange(448))
    return [np.stack([ramp % 256, ramp // 3, 255 - ramp // 3], axis=2).astype(np.uint8)]


def write_pools(loader: ModuleType, work: Path, photographs: list[np.ndarray]) -> None:
    for size in loader.SIZES:
        loader.write_pool(loader.pool_folder(work, size), replace(size, pictures=8), photographs)


def test_ours_alone(loader: ModuleType, photographs: list[np.ndarray], tmp_path: Path) -> None:
    write_pools(loader, tmp_path, photographs)
    command = [sys.executable, str(SCRIPT), "--quick", "--work", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    done = subprocess.run([*command, "--peers"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    jpegs = [size for size in loader.SIZES if size.extension == "jpg"]
    assert [row["work"] for row in rows] == [f"decode {size.name}" for size in jpegs for _ in ("samples/s", "MB/s")]
    for row in rows:
        assert set(row) == {"work", "ours", "peer", "unit", "ratio"}
        assert row["work"] in done.stdout
    for row in rows[::2]:
        assert row["unit"] == "samples/s"
        assert row["ours"] > 0
        assert row["ratio"] == pytest.approx(row["ours"] / row["peer"], rel=1e-2)


def test_better_is_above_one_in_every_unit(loader: ModuleType) -> None:
    fast = loader.Measured([90.0, 100.0, 500.0], first_s=1.0, memory_mb=500.0)
    slow = loader.Measured([10.0, 20.0, 25.0], first_s=3.0, memory_mb=2000.0)
    rows = loader.rows_of({"ours": fast, "open_clip": slow}, loader.SIZES[1], 2, sample_mb=0.1)
    assert [(row["work"], row["unit"], row["ratio"]) for row in rows] == [
        ("open_clip 640x480 2 workers", "samples/s", 5.0),
        ("open_clip 640x480 2 workers", "MB/s", 5.0),
        ("first batch, open_clip 640x480 2 workers", "s", 3.0),
        ("memory, open_clip 640x480 2 workers", "MB", 4.0),
    ]
    assert (rows[1]["ours"], rows[1]["peer"]) == (10.0, 2.0)


def test_pictures_are_the_same_every_time(loader: ModuleType, photographs: list[np.ndarray], tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_pools(loader, tmp_path / name, photographs)
    for size in loader.SIZES:
        one, two = (sorted(loader.pool_folder(tmp_path / name, size).iterdir()) for name in ("one", "two"))
        assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
        pictures = loader.picture_bytes(one[0].parent)
        assert len(pictures) == 8
        assert len(set(pictures)) > 1
