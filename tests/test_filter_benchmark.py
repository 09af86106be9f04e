"""The benchmark of the filter stage runs on a tiny pool, and finds out when the sides disagree."""

from pathlib import Path
from types import ModuleType

import polars as pl
import pytest

from mmfoundry.data.filters.subset import to_subset
from tests.data.filters.datacomp_pool import write_pool
from tests.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("filter")


def test_a_tiny_pool(script: ModuleType, tmp_path: Path) -> None:
    for module in ("pandas", "pyarrow", "ahocorasick_rs"):
        pytest.importorskip(module, reason=f"the benchmark's sides need {module}")
    effort = script.Effort(600, 2, {}, (30, 5), entries=300, workers=1)
    rows = script.run(["clip_score", "metaclip"], tmp_path, None, effort)
    assert [row["work"] for row in rows] == ["clip_score", "memory, clip_score", "metaclip matching"]
    for row in rows:
        assert set(row) == {"work", "ours", "peer", "unit", "ratio"}
        assert min(row["ours"], row["peer"], row["ratio"]) > 0


def test_sides_that_disagree(script: ModuleType, tmp_path: Path) -> None:
    write_pool(tmp_path, 20, 2, edges=False)
    uids = pl.concat([pl.read_parquet(path)["uid"] for path in sorted(tmp_path.glob("*.parquet"))])
    first = to_subset(uids[:3])
    script._expect_the_same("basic", to_subset(uids), to_subset(uids), tmp_path, limit=20)
    with pytest.raises(SystemExit, match=r"basic: we keep 20 .* it keeps 3"):
        script._expect_the_same("basic", to_subset(uids), first, tmp_path, limit=20)
    looked_at = to_subset(pl.concat([uids[:4], uids[10:14]]))
    script._expect_the_same("basic", to_subset(uids), looked_at, tmp_path, limit=4)
