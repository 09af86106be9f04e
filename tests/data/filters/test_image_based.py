"""data/filters/image_based.py; with given centroids against DataComp's rule in test_datacomp_parity.py."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfoundry.data.filters.image_based import ImageBased
from mmfoundry.data.filters.tree import parse_filter
from mmfoundry.pipeline.errors import ConfigError, MissingInput, MmfoundryError
from tests.data.filters.cutting import assert_cuts_do_not_matter
from tests.data.filters.rows import uid


def pool(points: np.ndarray) -> pl.DataFrame:
    values = pl.Series(points.astype(np.float32).tolist(), dtype=pl.List(pl.Float32))
    return pl.DataFrame({"uid": [uid(number) for number in range(len(points))], "l14_img": values})


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target") / "target.npy"
    np.save(path, np.eye(3, dtype=np.float32)[:1])
    return path


def test_given_centroids_are_compared_by_inner_product(target: Path, tmp_path: Path) -> None:
    """Centroids are not of length one, and the longest draws most: as in DataComp's code, unlike in k-means itself."""
    np.save(tmp_path / "centroids.npy", np.float32([[0.2, 0, 0], [0.9, 0.4, 0], [0, 0, 1]]))
    one = ImageBased(reference=target, centroids=tmp_path / "centroids.npy")
    points = np.float32([[0.2, 0, 0], [0, 1, 0], [0.1, 0, 1], [np.nan, 0, 0]])
    # the target, like the first point, is nearest to the second centroid, though the first centroid is the first point
    assert one.keep(pool(points)).to_list() == [True, True, False, None]
    assert (one.scope, one.num_rounds) == ("row", 0)
    np.save(tmp_path / "centroids.npy", np.float32([[0.2, 0, 0], [0, 0.4, 0], [0, 0, 1]]))
    assert one.keep(pool(points)).to_list() == [True, False, False, None], "a changed file is read again"


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_trained_centroids(target: Path, data: st.DataObject) -> None:
    draw = np.random.default_rng(2)
    points = np.eye(3)[[0] * 12 + [1] * 12 + [2] * 12] + draw.normal(0, 0.03, (36, 3))
    rows = pool(points).vstack(pl.DataFrame({"uid": [uid(99)], "l14_img": [None]}, schema=pool(points).schema))
    one = ImageBased(reference=target, num_clusters=3, max_points=30)
    kept = assert_cuts_do_not_matter(one, rows, data)
    assert kept == [True] * 12 + [False] * 24 + [None]
    assert one.scope == "pool"


def test_too_few_for_the_clusters(target: Path) -> None:
    with pytest.raises(MmfoundryError, match="l14_img: 5 clusters cannot be made of 2 samples; lower num_clusters"):
        ImageBased(reference=target, num_clusters=5).keep(pool(np.eye(3)[:2]))


def test_files_that_do_not_fit(target: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"none\.npy"):
        ImageBased(reference=target, centroids=tmp_path / "none.npy").keep(pool(np.eye(3)))
    np.save(tmp_path / "wide.npy", np.eye(4, dtype=np.float32))
    with pytest.raises(MmfoundryError, match="embeddings have 3 numbers, centroids 4"):
        ImageBased(reference=target, centroids=tmp_path / "wide.npy").keep(pool(np.eye(3)))


def test_the_column_must_hold_embeddings(target: Path) -> None:
    with pytest.raises(ConfigError, match="caption is a String, not an embedding"):
        parse_filter({"image_based": {"reference": str(target), "embedding": "caption"}})
