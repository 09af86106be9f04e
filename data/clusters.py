"""k-means clusters of embeddings, trained on a sample of a pool, and the cluster to which an embedding belongs."""

import pickletools
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mmfoundry.data.uids import high_low, mixed
from mmfoundry.pipeline.errors import DamagedInput, MissingInput, MmfoundryError


@dataclass(frozen=True)
class KMeans:
    """How clusters are found: k-means as DataComp's image-based baseline runs it (faiss, 20 iterations, plain L2).

    Training takes two rounds over a pool's parts, as in a pool filter: the draws of all samples, from which follows
    who is trained on, and their embeddings. Who is drawn follows from the uids alone.

    Attributes:
        column: of embeddings.
        num_clusters: centroids.
        iterations: of k-means.
        max_points: samples to train on, at most; one per uid.
        seed: of the draw and of the first centroids.
    """

    column: str
    num_clusters: int
    iterations: int = 20
    max_points: int = 1_000_000
    seed: int = 0

    num_rounds = 2

    def partial(self, table: pl.DataFrame, states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The lowest draws of a part; then the embeddings of the samples that are trained on."""
        high, low = table.select(*high_low()).get_columns()
        draws = pl.Series("draw", mixed(high.to_numpy(), low.to_numpy(), seed=self.seed), dtype=pl.UInt64)
        if not states:
            return draws.filter(table[self.column].is_not_null()).unique().bottom_k(self.max_points).to_frame()
        highest = states[0]["draw"].max()
        rows = pl.DataFrame([draws, table[self.column].alias("embedding")]).drop_nulls()
        return rows.filter(pl.lit(highest is not None) & (pl.col("draw") <= highest)).unique("draw", keep="first")

    def merge(self, partials: Sequence[pl.LazyFrame], states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The highest draw that is trained on; then "centroid".

        Raises:
            MmfoundryError: there are fewer samples with an embedding than clusters.
        """
        draws = pl.concat(partials)
        if not states:
            lowest = draws.unique().bottom_k(self.max_points, by="draw").collect(engine="streaming")
            return lowest.select(pl.col("draw").max())
        points = matrix_of(draws.unique("draw", keep="any").sort("draw").collect()["embedding"])
        points = points[np.isfinite(points).all(axis=1)]
        centroids = train_centroids(points, self.num_clusters, self.iterations, self.seed, self.column)
        return pl.DataFrame({"centroid": pl.Series(centroids, dtype=pl.Array(pl.Float32, centroids.shape[1]))})


def train_centroids(points: np.ndarray, count: int, iterations: int, seed: int, name: str = "embeddings") -> np.ndarray:
    """k-means: float32 (n, D) points -> float32 (count, D) centroids.

    Raises:
        MmfoundryError: fewer points than centroids.
    """
    if len(points) < count:
        raise MmfoundryError(f"{name}: {count} clusters cannot be made of {len(points)} samples; lower num_clusters")
    library = faiss_library()
    clustering = library.Clustering(points.shape[1], count)
    clustering.niter, clustering.seed = iterations, seed
    clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, 2**31 - 1  # all points, no warning
    clustering.train(np.ascontiguousarray(points, np.float32), library.IndexFlatL2(points.shape[1]))
    found: np.ndarray = library.vector_to_array(clustering.centroids).reshape(count, -1)
    return found


def nearest(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The centroid with the highest inner product, as DataComp assigns: (n, D), (K, D) -> int64 (n,).

    Raises:
        MmfoundryError: the widths differ.
    """
    if points.shape[1] != centroids.shape[1]:
        raise MmfoundryError(
            f"embeddings have {points.shape[1]} numbers, centroids {centroids.shape[1]}: are they another model's?"
        )
    index = faiss_library().IndexFlatIP(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids, np.float32))
    found: np.ndarray = index.search(np.ascontiguousarray(points, np.float32), 1)[1][:, 0]
    return found


def assign(embeddings: pl.Series, centroids: np.ndarray) -> pl.Series:
    """The nearest centroid of each row, UInt32; null without an embedding or where it is not finite."""
    found = pl.Series("cluster", [None], dtype=pl.UInt32).new_from_index(0, len(embeddings))
    present = embeddings.is_not_null().arg_true()
    if not len(present):
        return found
    points = matrix_of(embeddings.gather(present))
    finite = np.isfinite(points).all(axis=1)
    clusters = pl.Series(nearest(points[finite], centroids), dtype=pl.UInt32)
    return found.scatter(present.filter(pl.Series(finite)), clusters)


def matrix_of(embeddings: pl.Series) -> np.ndarray:
    """Lists or arrays of one length -> float32 (n, D).

    Raises:
        DamagedInput: the lengths differ.
    """
    if isinstance(embeddings.dtype, pl.Array):
        return np.asarray(embeddings.to_numpy(), np.float32).reshape(len(embeddings), embeddings.dtype.size)
    widths = embeddings.list.len().unique().to_list()
    if len(widths) > 1:
        raise DamagedInput(f"{embeddings.name}: embeddings have {' and '.join(map(str, sorted(widths)[:3]))} numbers")
    if not widths:
        return np.zeros((0, 0), np.float32)
    flat = embeddings.explode().to_numpy() if widths[0] else np.zeros(0)
    return np.asarray(flat, np.float32).reshape(len(embeddings), widths[0])


def read_matrix(path: Path) -> np.ndarray:
    """A matrix of embeddings or centroids, float32 (n, D).

    Args:
        path: `.npy`, `.npz` or `.safetensors` (with one two-dimensional array), or `.pt`: a tensor or array, or a
            mapping to a tensor, as DataComp publishes its centroids and ImageNet's embeddings; no code in it is run.
    Raises:
        MissingInput: there is no such file.
        DamagedInput: it holds something else.
    """
    if not path.is_file():
        raise MissingInput(f"there is no {path}")
    try:
        found = _READERS[path.suffix](path)
    except KeyError as error:
        raise DamagedInput(f"{path}: embeddings are read from {', '.join(sorted(_READERS))}") from error
    except Exception as error:  # each reader has its own; the file is somebody else's
        raise DamagedInput(f"{path} cannot be read: {str(error).splitlines()[0][:200]}") from error
    matrices = [one for one in found if one.ndim == 2]
    if len(matrices) != 1:
        raise DamagedInput(f"{path} holds {len(matrices)} matrices, not one")
    return np.asarray(matrices[0], np.float32)


def _from_torch(path: Path) -> list[np.ndarray]:
    import torch

    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        array = _pickled_array(archive.read(name))
    if array is not None:
        return [array]
    found = torch.load(path, map_location="cpu", weights_only=True)
    values = list(found.values()) if isinstance(found, dict) else [found]
    return [value.float().numpy() for value in values if isinstance(value, torch.Tensor)]


def _pickled_array(data: bytes) -> np.ndarray | None:
    """The numpy matrix that a pickle consists of, read off its instructions, of which none is carried out."""
    instructions = [(code.name, value) for code, value, _ in pickletools.genops(data)]
    kinds = [value for _, value in instructions if value in ("f2", "f4", "f8")]
    payload = max((value for _, value in instructions if isinstance(value, bytes)), key=len, default=b"")
    if len(kinds) != 1 or "ndarray" not in [str(value).rpartition(" ")[2] for _, value in instructions]:
        return None
    dtype = np.dtype(f"<{kinds[0]}")
    numbers = [value for name, value in instructions if "INT" in name and isinstance(value, int)]
    for rows, width in pairwise(numbers):  # the shape stands somewhere in between
        if rows > 0 and width > 0 and rows * width * dtype.itemsize == len(payload):
            return np.frombuffer(payload, dtype).reshape(rows, width)
    return None


def _from_safetensors(path: Path) -> list[np.ndarray]:
    from safetensors.torch import load_file

    return [tensor.float().numpy() for tensor in load_file(path).values()]


_READERS = {
    ".npy": lambda path: [np.load(path, allow_pickle=False)],
    ".npz": lambda path: list(np.load(path, allow_pickle=False).values()),
    ".safetensors": _from_safetensors,
    ".pt": _from_torch,
}


def faiss_library() -> Any:
    """faiss.

    Raises:
        MissingInput: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingInput("clusters need faiss: pip install 'mmfoundry[filter]'") from error
    return faiss
