"""`decontaminate`: nothing that a model is going to be evaluated on."""

from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import polars as pl
from pydantic import Field, field_validator, model_validator

from mmfoundry.data.clusters import faiss_library
from mmfoundry.data.eval_sets import eval_column, eval_files
from mmfoundry.data.filters.base import FILTERS, Filter
from mmfoundry.data.filters.parameters import embedding_column
from mmfoundry.data.filters.semantic import unit_vectors
from mmfoundry.pipeline.errors import DamagedInput


@FILTERS.register("decontaminate")
class Decontaminate(Filter):
    """The image is in no evaluation set: not by its bytes, nor by its looks, nor by its embedding.

    DataComp removed near duplicates of its evaluation sets from its pool in this way, by embeddings of a copy detector
    (Gadre et al. 2023, arXiv 2304.14108, section 3.2). Each test that is on is made; a row on which none says that it
    is in a set, but one cannot say, cannot be judged.
    """

    dear: ClassVar[bool] = True

    evals: list[Path] = Field(
        min_length=1, description="sets: tables with the columns that are compared, or tars or folders of pictures"
    )
    exact: bool = Field(True, description="compare the images' bytes (sha256)")
    radius: int | None = Field(
        28, ge=0, le=200, description="bits of 512 in which perceptual hashes may differ; null: off"
    )
    min_similarity: float | None = Field(
        None, gt=-1, le=1, description="cosine from which images are the same; null: off"
    )
    embedding: str = Field("b32_img", description="column of embeddings, here and in the sets' tables")

    @field_validator("evals", mode="before")
    @classmethod
    def _one_is_a_list(cls, evals: object) -> object:
        return [evals] if isinstance(evals, str | Path) else evals

    @field_validator("embedding")
    @classmethod
    def _known(cls, name: str) -> str:
        return embedding_column(name)

    @model_validator(mode="after")
    def _some_test(self) -> "Decontaminate":
        if not self.columns():
            raise ValueError("every test is off; set exact, radius or min_similarity")
        return self

    def columns(self) -> frozenset[str]:
        """What the tests that are on compare."""
        on = {"sha256": self.exact, "perceptual_hash": self.radius is not None}
        on[self.embedding] = self.min_similarity is not None
        return frozenset(name for name, is_on in on.items() if is_on)

    def files(self) -> tuple[Path, ...]:
        """The evaluation sets."""
        return tuple(file for path in self.evals for file in eval_files(path))

    def keep(self, table: pl.DataFrame) -> pl.Series:
        """True where no test finds the image; null where one that cannot say might have."""
        found = pl.Series("keep", [False]).new_from_index(0, table.height)
        version = tuple((file, file.stat().st_mtime_ns) for file in self.files())
        if self.exact:
            known = _values(tuple(self.evals), "sha256", version)
            found = found | table["sha256"].is_in(known.implode())
        if self.radius is not None:
            found = found | _within(table["perceptual_hash"], _hashes(tuple(self.evals), version), self.radius)
        if self.min_similarity is not None:
            units = _units(tuple(self.evals), self.embedding, version)
            found = found | _similar(table[self.embedding], units, self.min_similarity)
        return (~found).alias("keep")


def _within(hashes: pl.Series, known: np.ndarray, radius: int) -> pl.Series:
    """Whether a hash is within `radius` bits of a known one; null without a hash."""
    present = hashes.is_not_null()
    own = _matrix(hashes.filter(present))
    near = np.zeros(len(own), bool)
    if len(own) and len(known):
        if own.shape[1] != known.shape[1]:
            raise DamagedInput(
                f"decontaminate: perceptual hashes of {known.shape[1]} bytes, not {own.shape[1]}: made anew?"
            )
        index = faiss_library().IndexBinaryFlat(known.shape[1] * 8)
        index.add(known)
        near = index.search(own, 1)[0][:, 0] <= radius
    return _spread(present, near)


def _similar(embeddings: pl.Series, known: np.ndarray, min_similarity: float) -> pl.Series:
    """Whether an embedding has at least a cosine with a known one; null where it says nothing."""
    units, present = unit_vectors(embeddings)
    near = np.zeros(len(units), bool)
    if len(units) and len(known):
        if units.shape[1] != known.shape[1]:
            raise DamagedInput(
                f"decontaminate: embeddings of {known.shape[1]} numbers, not {units.shape[1]}: another model's?"
            )
        index = faiss_library().IndexFlatIP(known.shape[1])
        index.add(known)
        near = index.search(units, 1)[0][:, 0] >= min_similarity
    return _spread(present, near)


def _spread(present: pl.Series, values: np.ndarray) -> pl.Series:
    found = pl.Series("keep", [None], dtype=pl.Boolean).new_from_index(0, len(present))
    return found.scatter(present.arg_true(), pl.Series(values, dtype=pl.Boolean))


def _matrix(hashes: pl.Series) -> np.ndarray:
    values = hashes.to_list()
    return np.frombuffer(b"".join(values), np.uint8).reshape(len(values), -1 if values else 1)


@lru_cache(maxsize=16)
def _values(evals: tuple[Path, ...], column: str, version: object) -> pl.Series:
    return pl.concat([eval_column(path, column) for path in evals])


@lru_cache(maxsize=4)
def _hashes(evals: tuple[Path, ...], version: object) -> np.ndarray:
    return _matrix(_values(evals, "perceptual_hash", version))


@lru_cache(maxsize=4)
def _units(evals: tuple[Path, ...], column: str, version: object) -> np.ndarray:
    return unit_vectors(_values(evals, column, version))[0]
