"""The benchmark of the sampler: its orders are orders, its measure of mixing is right where the answer is known."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("sampler")


def test_noise_is_one_for_independent_draws_and_known_for_shards_in_turn(script: ModuleType) -> None:
    sizes = [script.BATCH * 4] * 10
    drawn = np.random.default_rng(0).integers(0, sum(sizes), 100 * script.BATCH)
    assert script.noise(drawn, sizes) == pytest.approx(1, rel=0.15)  # 900 degrees of freedom
    # each batch is of one shard: its shares differ from the pool's by p(1 - p) in sum, without the division by BATCH
    assert script.noise(np.arange(sum(sizes)), sizes) == pytest.approx(script.BATCH**0.5)


def test_the_orders_draw_each_sample_once(script: ModuleType) -> None:
    sizes = script.shard_sizes(40_000)
    assert sum(sizes) == 40_000
    assert sorted(script.our_order(sizes, 1000)) == list(range(40_000))
    assert sorted(script.whole_shards(sizes, 20_000)) == list(range(40_000))
    many = [4000] * 40  # some for each worker
    buffers = script.open_clip_order(many, 0)
    assert len(buffers) % script.BATCH == 0
    assert len(set(buffers)) == len(buffers) > 100_000


def test_rows_of_a_small_index(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "SHARDS", 3)
    monkeypatch.setattr(script, "PER_SHARD", 20)
    monkeypatch.setattr(script, "alone", lambda measure, *arguments: measure(*arguments))
    rows = script.index_rows(tmp_path)
    assert [row["unit"] for row in rows] == ["MB", "s", "MB"]
    assert rows[0]["ours"] > 0
    assert json.loads(json.dumps(rows)) == rows
    assert script.row("a", 2.0, 5.0, "ms") == {"work": "a", "ours": 2.0, "peer": 5.0, "unit": "ms", "ratio": 2.5}
