"""`semantic_duplicate`: pictures that mean the same, by their embeddings (SemDeDup)."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from pydantic import Field, field_validator

from mmfoundry.data.clusters import faiss_library, matrix_of
from mmfoundry.data.filters.base import FILTERS, PoolFilter
from mmfoundry.data.filters.near_duplicate import not_among
from mmfoundry.data.filters.parameters import embedding_column
from mmfoundry.data.uids import high_low, mixed
from mmfoundry.pipeline.errors import MmfoundryError

_ROWS_A_BLOCK = 1024  # of a cluster, compared at once with those before them
_SAMPLES_A_CLUSTER = 8_800  # SemDeDup: 440M samples in 50,000 clusters
_CANDIDATES = 4  # centroids looked at again in float64, since sums in float32 depend on how rows lie in memory
_BUCKET_BYTES = 1 << 29  # of embeddings, compared in memory


@FILTERS.register("semantic_duplicate")
class SemanticDuplicate(PoolFilter):
    """Of samples with nearly the same embedding, the one farthest from its cluster's centroid stays.

    SemDeDup (Abbas et al. 2023, arXiv 2303.09540): embeddings are scaled to length 1 and clustered by spherical
    k-means, each sample belongs to the centroid of highest cosine, and in each cluster samples are ordered from the
    farthest from the centroid to the nearest. One is dropped if its cosine with any sample before it, dropped or not,
    is above 1 - epsilon. Samples at the same distance are ordered by uid. An embedding that is missing, zero or not
    finite cannot be judged.
    """

    epsilon: float = Field(0.05, ge=0, lt=1, description="cosines above 1 - epsilon are called the same")
    embedding: str = Field("b32_img", description="column of the images' embeddings")
    num_clusters: int | None = Field(
        None, ge=1, description="clusters; SemDeDup: 50000 of 440M; null: one to 8800 samples"
    )
    iterations: int = Field(100, ge=1, description="of k-means; SemDeDup: 100")
    points_per_cluster: int = Field(256, ge=1, description="samples to train each cluster on, at most; faiss: 256")
    seed: int = Field(0, ge=0, description="of who is trained on, and of k-means")

    num_rounds = 3

    @field_validator("embedding")
    @classmethod
    def _known(cls, name: str) -> str:
        return embedding_column(name)

    def columns(self) -> frozenset[str]:
        """The embeddings."""
        return frozenset({self.embedding})

    def partial(self, table: pl.DataFrame, states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """Draws of who is trained on; the embeddings of those; each sample's cluster, distance and embedding."""
        units, present = unit_vectors(table[self.embedding])
        rows = table.select(*high_low()).filter(present)
        if len(states) < 2:
            draws = pl.Series("draw", mixed(rows["high"].to_numpy(), rows["low"].to_numpy(), seed=self.seed))
            if not states:
                return draws.unique().to_frame()
            chosen = (draws <= states[0]["draw"][0]).arg_true().to_numpy() if states[0]["samples"][0] else []
            return _with_vectors(pl.DataFrame([draws[chosen]]), units[chosen])
        clusters, distances = nearest_centroids(units, matrix_of(states[1]["vector"]))
        numbers = {"cluster": pl.Series(clusters, dtype=pl.UInt32), "distance": pl.Series(distances, dtype=pl.Float64)}
        return _with_vectors(rows.with_columns(**numbers), units)

    def merge(self, partials: Sequence[pl.LazyFrame], states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The highest draw that is trained on, with samples and clusters; the centroids; the uids that are dropped.

        Raises:
            MmfoundryError: there are fewer samples with an embedding than clusters.
        """
        if not states:
            draws = np.unique(np.concatenate([partial.collect()["draw"].to_numpy() for partial in partials]))
            clusters = self.num_clusters or max(1, round(len(draws) / _SAMPLES_A_CLUSTER))
            last = min(clusters * self.points_per_cluster, len(draws)) - 1
            highest = pl.Series([draws[last] if len(draws) else 0], dtype=pl.UInt64)
            return pl.DataFrame({"draw": highest, "samples": [len(draws)], "clusters": [clusters]})
        if len(states) == 1:
            return self._centroids([partial.collect() for partial in partials], states[0]["clusters"][0])
        return _duplicates(partials, 1.0 - self.epsilon)

    def judge(self, table: pl.DataFrame, states: Sequence[pl.DataFrame], partials: Sequence[pl.DataFrame]) -> pl.Series:
        """True for samples that stay; null where the embedding says nothing."""
        known = unit_vectors(table[self.embedding])[1]
        return not_among(table.select("uid", known=known), states[2], known=pl.col("known"))

    def _centroids(self, tables: Sequence[pl.DataFrame], count: int) -> pl.DataFrame:
        """k-means of the draws' "vector"s."""
        drawn = [table.with_columns(pl.col("vector").arr.to_list()) for table in tables if table.height]
        if not drawn:
            return pl.DataFrame({"vector": pl.Series([], dtype=pl.Array(pl.Float32, 1))})
        vector = pl.col("vector").list
        # samples of one uid have one draw: their embeddings say which of them is taken
        table = pl.concat(drawn).sort("draw", vector.first(), vector.last())
        points = matrix_of(table.unique("draw", keep="first", maintain_order=True)["vector"])
        if len(points) < count:
            raise MmfoundryError(
                f"semantic_duplicate: {count} clusters cannot be made of {len(points)} samples; lower num_clusters"
            )
        library = faiss_library()
        clustering = library.Clustering(points.shape[1], count)
        clustering.niter, clustering.seed, clustering.spherical = self.iterations, self.seed, True
        clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, 2**31 - 1  # all, no warning
        clustering.train(points, library.IndexFlatIP(points.shape[1]))
        centroids: np.ndarray = library.vector_to_array(clustering.centroids).reshape(count, -1)
        return _with_vectors(pl.DataFrame(), centroids)


def unit_vectors(embeddings: pl.Series) -> tuple[np.ndarray, pl.Series]:
    """Embeddings scaled to length 1.

    Args:
        embeddings: lists or arrays of one length, or null.
    Returns:
        float32 (rows that have one, D); and for each row whether it has one: not null, not zero, finite.
    """
    present = embeddings.is_not_null()
    points = matrix_of(embeddings.filter(present))
    length = np.concatenate(  # in float64 and row by row: the same wherever a row lies
        [np.sqrt(np.square(points[i : i + 4096].astype(np.float64)).sum(axis=1)) for i in range(0, len(points), 4096)]
        or [np.empty(0)]
    )
    good = np.isfinite(length) & (length > 0)
    units = (points[good] / length[good, None].astype(np.float32)).astype(np.float32)
    return units, present.scatter(present.arg_true(), pl.Series(good, dtype=pl.Boolean))


def nearest_centroids(units: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The centroid of highest cosine for each row, and how far it is.

    Args:
        units: float32 (n, D), of length 1.
        centroids: float32 (K, D), of length 1.
    Returns:
        int64 (n,), and 1 - cosine, float64 (n,); the same however rows are put together.
    """
    if not len(units):
        return np.empty(0, np.int64), np.empty(0)
    index = faiss_library().IndexFlatIP(centroids.shape[1])
    index.add(centroids)
    near = np.sort(index.search(units, min(_CANDIDATES, len(centroids)))[1], axis=1)
    cosines = np.empty(near.shape)
    for i in range(0, len(units), 4096):
        rows = slice(i, i + 4096)
        wide = units[rows].astype(np.float64)
        for column in range(near.shape[1]):
            cosines[rows, column] = (wide * centroids[near[rows, column]]).sum(axis=1)
    best = cosines.argmax(axis=1)[:, None]
    return np.take_along_axis(near, best, 1)[:, 0], 1.0 - np.take_along_axis(cosines, best, 1)[:, 0]


def drop_similar(units: np.ndarray, threshold: float) -> np.ndarray:
    """Which rows have a cosine above a threshold with any row before them: float32 (n, D) -> bool (n,)."""
    dropped = np.zeros(len(units), bool)
    for start in range(0, len(units), _ROWS_A_BLOCK):
        block = units[start : start + _ROWS_A_BLOCK]
        cosines = block @ units[: start + len(block)].T
        cosines[np.arange(cosines.shape[1]) >= start + np.arange(len(block))[:, None]] = -np.inf
        dropped[start : start + len(block)] = cosines.max(axis=1) > threshold
    return dropped


def _duplicates(partials: Sequence[pl.LazyFrame], threshold: float) -> pl.DataFrame:
    """The uids that are dropped, cluster by cluster.

    Embeddings of a large pool do not fit into memory: they are dealt out to files, each of the clusters that come after
    each other until there is half a gigabyte, and compared a file at a time.
    """
    sizes = np.zeros(1, np.int64)
    width = 0
    for partial in partials:
        dtype = partial.collect_schema()["vector"]
        assert isinstance(dtype, pl.Array)
        found = np.bincount(partial.select("cluster").collect()["cluster"].to_numpy())
        sizes = np.pad(sizes, (0, max(0, len(found) - len(sizes))))
        sizes[: len(found)] += found
        width = dtype.size if len(found) else width
    row = np.dtype([("high", "u8"), ("low", "u8"), ("cluster", "u4"), ("distance", "f8"), ("vector", "f4", (width,))])
    bucket_of = (np.cumsum(sizes) - sizes) * row.itemsize // _BUCKET_BYTES
    dropped = [np.empty((0, 2), np.uint64)]
    with tempfile.TemporaryDirectory(prefix="semantic_duplicate_") as folder:
        for partial in partials:
            table = partial.collect()
            if table.height:
                rows = np.empty(table.height, row)
                for name in ("high", "low", "cluster", "distance"):
                    rows[name] = table[name].to_numpy()
                rows["vector"] = matrix_of(table["vector"])
                buckets = bucket_of[rows["cluster"]]
                for bucket in np.unique(buckets):
                    with (Path(folder) / str(bucket)).open("ab") as file:
                        rows[buckets == bucket].tofile(file)
        for path in Path(folder).iterdir():
            dropped += _dropped_in(np.fromfile(path, row), threshold)
    uids = np.unique(np.concatenate(dropped), axis=0)
    return pl.DataFrame({"high": uids[:, 0], "low": uids[:, 1]})


def _dropped_in(rows: np.ndarray, threshold: float) -> list[np.ndarray]:
    """uids, (n, 2), that are dropped of each cluster; all of a cluster's samples are there, in any order."""
    order = np.lexsort((rows["low"], rows["high"], -rows["distance"], rows["cluster"]))
    dropped = []
    for members in np.split(order, np.flatnonzero(np.diff(rows["cluster"][order])) + 1):
        uids = np.stack([rows["high"][members], rows["low"][members]], axis=1)
        first = np.sort(np.unique(uids, axis=0, return_index=True)[1])  # a sample is no duplicate of itself
        members, uids = members[first], uids[first]
        dropped.append(uids[drop_similar(rows["vector"][members], threshold)])
    return dropped


def _with_vectors(rows: pl.DataFrame, vectors: np.ndarray) -> pl.DataFrame:
    series = pl.Series("vector", vectors, dtype=pl.Array(pl.Float32, max(vectors.shape[1], 1)))
    return rows.with_columns(series) if rows.width else series.to_frame()
