"""data/clusters.py: k-means, assignment, and the files that embeddings are read from."""

import contextlib
import os
from multiprocessing import reduction
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import save_file

from mmfoundry.data.clusters import KMeans, assign, matrix_of, nearest, read_matrix, train_centroids
from mmfoundry.pipeline.errors import DamagedInput, MissingInput
from tests.data.filters.rows import uid

POINTS = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)


def lloyd(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """One step of k-means."""
    own = ((points[:, None] - centroids) ** 2).sum(-1).argmin(1)
    return np.stack([points[own == number].mean(0) for number in range(len(centroids))])


def test_k_means_ends_where_a_step_changes_nothing() -> None:
    centroids = train_centroids(POINTS, 4, iterations=50, seed=0)
    np.testing.assert_allclose(lloyd(POINTS, centroids), centroids, atol=1e-5)


def test_nearest_is_the_highest_inner_product() -> None:
    centroids = POINTS[:7] * np.arange(1, 8, dtype=np.float32)[:, None]
    assert nearest(POINTS, centroids).tolist() == (POINTS @ centroids.T).argmax(1).tolist()


def test_rows_without_an_embedding_have_no_cluster() -> None:
    values = [[1.0, 0.0], None, [float("nan"), 0.0], [0.0, 1.0]]
    for dtype in (pl.List(pl.Float32), pl.Array(pl.Float32, 2)):
        found = assign(pl.Series(values, dtype=dtype), np.eye(2, dtype=np.float32))
        assert found.to_list() == [0, None, None, 1]
    assert assign(pl.Series([None], dtype=pl.List(pl.Float32)), np.eye(2, dtype=np.float32)).to_list() == [None]


def test_embeddings_of_two_widths() -> None:
    with pytest.raises(DamagedInput, match="embeddings have 1 and 2 numbers"):
        matrix_of(pl.Series([[1.0], [1.0, 2.0]], dtype=pl.List(pl.Float32)))


def test_who_is_trained_on_follows_from_the_uids() -> None:
    rows = pl.DataFrame(
        {"uid": [uid(number) for number in range(40)], "a_img": pl.Series(POINTS.tolist(), dtype=pl.List(pl.Float32))}
    )
    training = KMeans("a_img", num_clusters=3, max_points=10)
    states: list[list[pl.DataFrame]] = []
    for parts in ([rows], [rows[25:], rows[:25].vstack(rows[:3])]):  # the same pool, a few samples twice
        found: list[pl.DataFrame] = []
        for _ in range(training.num_rounds):
            partials = [training.partial(part, found) for part in parts]
            found.append(training.merge([partial.lazy() for partial in partials], found))
        assert sum(partial.height for partial in partials) <= 13
        states.append(found)
    assert states[0][1].equals(states[1][1])


def test_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", POINTS)
    np.savez(tmp_path / "a.npz", some=POINTS)
    save_file({"some": POINTS}, tmp_path / "a.safetensors")
    torch.save({"image_features": torch.from_numpy(POINTS)}, tmp_path / "mapping.pt")
    torch.save(torch.from_numpy(POINTS), tmp_path / "tensor.pt")
    for protocol in (2, 4):  # DataComp's centroids: an array, protocol 4, which torch itself refuses to read safely
        torch.save(POINTS, tmp_path / f"array{protocol}.pt", pickle_protocol=protocol)
    for path in sorted(tmp_path.iterdir()):
        if path.name == "array2.pt":  # numpy writes bytes as text there
            continue
        np.testing.assert_array_equal(read_matrix(path), POINTS, err_msg=path.name)


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    class Command:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save(Command(), tmp_path / "a.pt")
    torch.save([Command(), POINTS], tmp_path / "b.pt", pickle_protocol=4)
    np.save(tmp_path / "c.npy", np.array([[Command()]], object), allow_pickle=True)
    (tmp_path / "d.npy").write_bytes(bytes(reduction.ForkingPickler.dumps(Command())))
    for name in ("a.pt", "c.npy", "d.npy"):
        with pytest.raises(DamagedInput, match=name):
            read_matrix(tmp_path / name)
    with contextlib.suppress(DamagedInput):  # the matrix may be found in it
        read_matrix(tmp_path / "b.pt")
    assert not (tmp_path / "run").exists()


def test_what_is_no_matrix(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", POINTS[0])
    np.savez(tmp_path / "two.npz", a=POINTS, b=POINTS)
    (tmp_path / "a.txt").write_text("1 2")
    (tmp_path / "a.pt").write_text("1 2")
    for name, message in (
        ("flat.npy", "0 matrices"),
        ("two.npz", "2 matrices"),
        ("a.txt", ".npy, .npz"),
        ("a.pt", "zip"),
    ):
        with pytest.raises(DamagedInput, match=message):
            read_matrix(tmp_path / name)
    with pytest.raises(MissingInput):
        read_matrix(tmp_path / "none.npy")
