"""benchmarks/text_packing.py: the rows that it prints; their numbers are made by running it."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from tests.scripts import BENCHMARKS


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "text_packing.py"), "--quick", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    each = product(("web captions", "sample pool"), ("text tower", "step"), ("trimmed", "4 groups"))
    assert [row["work"] for row in rows] == [f"{what}, {captions}, batch 16, {peer}" for captions, what, peer in each]
    assert all(set(row) == {"work", "ours", "peer", "unit", "ratio"} and row["ours"] > 0 for row in rows)
