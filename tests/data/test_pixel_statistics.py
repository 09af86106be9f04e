"""data/pixel_statistics.py: entropy at values known from its definition."""

from pathlib import Path

import numpy as np
import pytest

from mmfoundry.data.columns import rows_of
from mmfoundry.data.decode import DecodeLimits
from mmfoundry.data.pixel_statistics import pixel_entropy
from mmfoundry.data.sample import RawSample
from tests.data.conftest import encode, smooth


def grey(levels: list[int]) -> np.ndarray:
    return np.repeat(np.array(levels, np.uint8).reshape(1, -1, 1), 3, axis=2)


@pytest.mark.parametrize(
    ("levels", "bits"),
    [([7] * 50, 0.0), ([0, 255] * 20, 1.0), ([0, 0, 0, 255], 0.8112781245), (list(range(256)), 8.0)],
)
def test_known_values(levels: list[int], bits: float) -> None:
    assert pixel_entropy(grey(levels)) == pytest.approx(bits, abs=1e-9)
    assert str(pixel_entropy(grey([3]))) == "0.0"


def test_where_pixels_lie_does_not_count() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    shuffled = np.random.default_rng(1).permutation(pixels.reshape(-1, 3)).reshape(20, 30, 3)
    assert pixel_entropy(pixels) == pytest.approx(pixel_entropy(shuffled), abs=1e-12)


def test_it_is_a_column_of_the_table() -> None:
    raw = RawSample("a", {"png": encode(smooth(0)), "txt": b"a picture"}, Path("pool.tar"))
    (row,) = rows_of(raw, 0, 0, frozenset({"pixel_entropy"}), DecodeLimits())
    assert row["pixel_entropy"] == pixel_entropy(smooth(0)) > 3
