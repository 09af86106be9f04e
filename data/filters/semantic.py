"""`semantic_duplicate`: pictures that mean the same, by their embeddings (SemDeDup)."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from pydantic import Field, field_validator

from mmfoundry.data.clusters import faiss_library, matrix_of
from mmfoundry.data.crew import Crew
from mmfoundry.data.filters.base import FILTERS, SharedMerge
from mmfoundry.data.filters.near_duplicate import not_among
from mmfoundry.data.filters.parameters import embedding_column
from mmfoundry.data.uids import high_low, mixed
from mmfoundry.pipeline.errors import MmfoundryError

_ROWS_A_BLOCK = 1024  # of a cluster, compared at once with some of those before them
_ROWS_BEFORE = 8192  # how many: 32 MB of cosines
_SAMPLES_A_CLUSTER = 8_800  # SemDeDup: 440M samples in 50,000 clusters
_CANDIDATES = 4  # centroids looked at again in float64, since sums in float32 depend on how rows lie in memory
_BUCKET_BYTES = 1 << 28  # of embeddings, compared in the memory of one worker


@FILTERS.register("semantic_duplicate")
class SemanticDuplicate(SharedMerge):
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

    def merge_with(self, crew: Crew, partials: Sequence[pl.LazyFrame], states: Sequence[pl.DataFrame]) -> pl.DataFrame:
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
            return self._centroids(partials, states[0]["clusters"][0])
        return _duplicates(crew, partials, 1.0 - self.epsilon)

    def judge(self, table: pl.DataFrame, states: Sequence[pl.DataFrame], partials: Sequence[pl.DataFrame]) -> pl.Series:
        """True for samples that stay; null where the embedding says nothing."""
        known = unit_vectors(table[self.embedding])[1]
        return not_among(table.select("uid", known=known), states[2], known=pl.col("known"))

    def _centroids(self, partials: Sequence[pl.LazyFrame], count: int) -> pl.DataFrame:
        """k-means of the draws' "vector"s."""
        tables = [table for table in (partial.collect() for partial in partials) if table.height]
        if not tables:
            return pl.DataFrame({"vector": pl.Series([], dtype=pl.Array(pl.Float32, 1))})
        draws = np.concatenate([table["draw"].to_numpy() for table in tables])
        points = np.empty((len(draws), matrix_of(tables[0]["vector"].head(1)).shape[1]), np.float32)
        for end in np.cumsum([table.height for table in tables]):
            table = tables.pop(0)  # each is let go before the next is copied
            points[end - table.height : end] = matrix_of(table["vector"])
        # samples of one uid have one draw: their embeddings say which of them is taken
        order = np.lexsort((points[:, -1], points[:, 0], draws))
        points = points[order[np.concatenate([[True], np.diff(draws[order]) != 0])]]
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
        rows = np.arange(start, min(start + _ROWS_A_BLOCK, len(units)))
        for first in range(0, rows[-1] + 1, _ROWS_BEFORE):
            rows = rows[~dropped[rows]]  # one that is like a row before it need not be held against others
            if not len(rows):
                break
            before = units[first : min(first + _ROWS_BEFORE, rows[-1] + 1)]
            cosines = units[rows] @ before.T
            cosines[first + np.arange(len(before)) >= rows[:, None]] = -np.inf
            dropped[rows] = cosines.max(axis=1) > threshold
    return dropped


def _duplicates(crew: Crew, partials: Sequence[pl.LazyFrame], threshold: float) -> pl.DataFrame:
    """The uids that are dropped, cluster by cluster.

    Embeddings of a large pool do not fit into memory: they are dealt out to files, each of the clusters that come after
    each other until there is a quarter of a gigabyte, and workers compare a file at a time.
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
    row = _row_type(width)
    bucket_of = (np.cumsum(sizes) - sizes) * row.itemsize // _BUCKET_BYTES
    folder = crew.folder / "clusters"
    shutil.rmtree(folder, ignore_errors=True)  # perhaps half of them, of a run that was cut off
    folder.mkdir(parents=True)
    for partial in partials:
        _deal(partial.collect(), row, bucket_of, folder)
    jobs = {f"dropped-{path.name}": _BucketJob(path, width, threshold) for path in sorted(folder.iterdir())}
    dropped = crew.tables(_dropped_of, jobs)
    shutil.rmtree(folder)
    none = pl.DataFrame(schema={"high": pl.UInt64(), "low": pl.UInt64()})
    return pl.concat([none, *dropped]).unique().sort("high", "low")


def _row_type(width: int) -> np.dtype[np.void]:
    """Of a sample in a file of clusters."""
    return np.dtype([("high", "u8"), ("low", "u8"), ("cluster", "u4"), ("distance", "f8"), ("vector", "f4", (width,))])


def _deal(table: pl.DataFrame, row: np.dtype[np.void], bucket_of: np.ndarray, folder: Path) -> None:
    """Append a part's samples to the files of their clusters."""
    numbers = bucket_of[table["cluster"].to_numpy()]
    for bucket in np.unique(numbers):
        some = table.filter(pl.Series(numbers == bucket))
        rows = np.empty(some.height, row)
        for name in ("high", "low", "cluster", "distance"):
            rows[name] = some[name].to_numpy()
        rows["vector"] = matrix_of(some["vector"])
        with (folder / str(bucket)).open("ab") as file:
            rows.tofile(file)


@dataclass(frozen=True)
class _BucketJob:
    """A file of whole clusters."""

    path: Path
    width: int
    threshold: float


def _dropped_of(job: _BucketJob) -> pl.DataFrame:
    """uids that are dropped of the clusters of a file, in any order."""
    dropped = np.concatenate(_dropped_in(np.fromfile(job.path, _row_type(job.width)), job.threshold))
    return pl.DataFrame({"high": dropped[:, 0], "low": dropped[:, 1]})


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
