"""`image_based`: images whose content is near that of a reference set, by clusters of their embeddings."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import polars as pl
from pydantic import Field, field_validator

from mmfoundry.data.clusters import KMeans, assign, matrix_of, nearest, read_matrix
from mmfoundry.data.filters.base import FILTERS, PoolFilter
from mmfoundry.data.filters.parameters import embedding_column


@FILTERS.register("image_based")
class ImageBased(PoolFilter):
    """The image's embedding falls into a cluster that an embedding of the reference set falls into as well.

    DataComp (Gadre et al. 2023, arXiv 2304.14108, `image_based` baseline) "retains samples whose images have content
    close to ImageNet-1k training images, as measured by the nearest-neighbor cluster center of the image's L/14 CLIP
    embedding". Pairs come there through the rules of `caption` first, so put `caption` before this filter; clusters are
    trained on what reaches it, or read from a file. Nearest is the highest inner product. Embeddings that are missing
    or not finite cannot be judged.
    """

    dear: ClassVar[bool] = True

    reference: list[Path] = Field(min_length=1, description="files with embeddings: npy, npz, safetensors, pt")
    embedding: str = Field("l14_img", description="column of the images' embeddings; DataComp: l14_img")
    centroids: Path | None = Field(None, description="file with the clusters' centroids; null trains them on the pool")
    num_clusters: int = Field(100_000, ge=1, description="clusters to train; DataComp: 100000")
    iterations: int = Field(20, ge=1, description="of k-means; DataComp: 20")
    max_points: int = Field(12_800_000, ge=1, description="samples to train clusters on, at most, drawn by their uids")
    seed: int = Field(0, ge=0, description="of the draw and of k-means")

    @field_validator("reference", mode="before")
    @classmethod
    def _one_is_a_list(cls, reference: object) -> object:
        return [reference] if isinstance(reference, str | Path) else reference

    @field_validator("embedding")
    @classmethod
    def _known(cls, name: str) -> str:
        return embedding_column(name)

    @property
    def num_rounds(self) -> int:  # type: ignore[override]
        """Those of the training."""
        return KMeans.num_rounds if self.centroids is None else 0

    def files(self) -> tuple[Path, ...]:
        """What the verdicts depend on besides the columns."""
        return (*self.reference, *([] if self.centroids is None else [self.centroids]))

    def columns(self) -> frozenset[str]:
        """The embeddings."""
        return frozenset({self.embedding})

    def partial(self, table: pl.DataFrame, states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """What the training must know of a part."""
        return self._training().partial(table, states)

    def merge(self, partials: Sequence[pl.LazyFrame], states: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """Who is trained on; then the centroids, and which of them the reference set hits."""
        state = self._training().merge(partials, states)
        if not states:
            return state
        centroids = matrix_of(state["centroid"])
        return state.with_columns(hit=pl.Series(_hits(self.reference, centroids)))

    def judge(self, table: pl.DataFrame, states: Sequence[pl.DataFrame], partials: Sequence[pl.DataFrame]) -> pl.Series:
        """True in a cluster that the reference set hits; null without an embedding."""
        if not table.height:
            return pl.Series("keep", [], dtype=pl.Boolean)
        if self.centroids is None:
            centroids, hits = matrix_of(states[1]["centroid"]), states[1]["hit"].to_numpy()
        else:
            stamps = tuple((path, path.stat().st_mtime_ns if path.is_file() else 0) for path in self.files())
            centroids, hits = _given(stamps)
        clusters = assign(table[self.embedding], centroids)
        return pl.Series("keep", hits)[clusters.fill_null(0)].set(clusters.is_null(), None)

    def _training(self) -> KMeans:
        return KMeans(self.embedding, self.num_clusters, self.iterations, self.max_points, self.seed)


@lru_cache(maxsize=2)
def _given(stamps: tuple[tuple[Path, int], ...]) -> tuple[np.ndarray, np.ndarray]:
    """Centroids and hits, of the reference files and, last, the file of centroids; read again when one has changed."""
    paths = [path for path, _ in stamps]
    centroids = read_matrix(paths[-1])
    return centroids, _hits(paths[:-1], centroids)


def _hits(reference: Sequence[Path], centroids: np.ndarray) -> np.ndarray:
    hits = np.zeros(len(centroids), bool)
    for path in reference:
        hits[nearest(read_matrix(path), centroids)] = True
    return hits
