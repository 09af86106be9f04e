"""What scores pairs in the `filter` stage: CLIPs, heads on their embeddings, detectors; and the task that runs them.

scorers:
  b32: {open_clip: ViT-B-32/openai}
  dfn: {model: runs/dfn/pretrain}
heads:
  aesthetic: {weights: aesthetic-v2.safetensors, scorer: l14}
detectors:
  text: rapidocr
  faces: {yunet: {weights: face_detection_yunet_2023mar.onnx}}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import polars as pl
import torch
from pydantic import Field, field_validator, model_validator

from mmfoundry.data.column import Column
from mmfoundry.data.decode import DecodeLimits
from mmfoundry.data.detectors.base import Detect, parse_detector
from mmfoundry.data.reader import Pool
from mmfoundry.data.scores import FACES, PLACE, TEXT_AREA, Head, Scoring, score_pairs, similarity
from mmfoundry.data.shard_names import Shard
from mmfoundry.data.table import write_parquet
from mmfoundry.models.heads import Activation, EmbeddingHead, Output, load_head, width_of
from mmfoundry.pipeline.config import ArtifactRef, Config, Neutral
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.stages.filter_encoders import Precision, TorchEncoder, load_encoder

_NAME = re.compile(r"[A-Za-z0-9_]+")
_READ = ("shard", "index", "caption_index", "caption", "unreadable")


class ScorerConfig(Config):
    """A CLIP that embeds pictures and captions."""

    model: ArtifactRef | None = Field(
        None, description="a CLIP: a pretrain artifact, a folder or hub id of open_clip or transformers (CLIP, SigLIP)"
    )
    open_clip: str | None = Field(
        None, description="ARCHITECTURE/TAG of open_clip; or the architecture alone, of the weights file in `model`"
    )
    batch_size: int = Field(64, ge=1, description="pictures, and captions, a forward pass")
    precision: Precision = Field("auto", description="of matrix products; auto: bf16 on GPUs that have it, else fp32")
    write: frozenset[Literal["score", "img", "txt"]] = Field(
        frozenset(), description="columns that are written even though no filter reads them"
    )

    @model_validator(mode="after")
    def _names_a_model(self) -> ScorerConfig:
        if self.model is None and (self.open_clip is None or "/" not in self.open_clip):
            raise ConfigError("give model (a folder, a hub id), or open_clip as ARCHITECTURE/TAG")
        return self


class HeadConfig(Config):
    """A small network on a scorer's embeddings: aesthetic predictors, NSFW detectors."""

    weights: ArtifactRef = Field(description="a safetensors file of linear layers and normalisations")
    scorer: str = Field(description="the scorer whose embeddings it reads")
    reads: Literal["image", "text"] = Field("image", description="embeddings of pictures or of captions")
    layers: tuple[str, ...] = Field((), description="names of its layers in order; empty: by the numbers in them")
    activation: Activation = Field("none", description="after every linear layer but the last")
    output: Output = Field("none", description="what is done to the last layer's output")
    output_index: int = Field(0, ge=0, description="which of the last layer's outputs is the score")


class DetectorsConfig(Config):
    """What is looked for in pictures, each by the name of a detector or its name with parameters."""

    text: Any = Field(None, description="makes text_area, and with it masked scores; rapidocr; null: none")
    faces: Any = Field(None, description="makes face_bboxes; yunet: {weights: FILE}; null: none")

    @model_validator(mode="after")
    def _known(self) -> DetectorsConfig:
        for finds in ("text", "faces"):
            if (tree := getattr(self, finds)) is not None:
                parse_detector(tree, finds, f"detectors.{finds}")
        return self


class ScoringConfig(Config):
    """All that models compute of a pool."""

    scorers: dict[str, ScorerConfig] = Field(default_factory=dict, description="CLIPs by name")
    heads: dict[str, HeadConfig] = Field(
        default_factory=dict, description="networks on embeddings, by name; NAME makes the column NAME_score"
    )
    detectors: DetectorsConfig = Field(DetectorsConfig(), description="of text and of faces")
    decode_threads: Annotated[int, Neutral()] = Field(
        1, ge=1, description="that decode and prepare pictures in each process; more where a GPU would wait for them"
    )

    @field_validator("scorers", "heads")
    @classmethod
    def _names(cls, named: dict[str, Any]) -> dict[str, Any]:
        for name in named:
            if not _NAME.fullmatch(name) or name.endswith("_masked"):
                raise ConfigError(f"{name!r}: letters, digits and _ only, and not _masked at the end")
        return named

    @model_validator(mode="after")
    def _fits_together(self) -> ScoringConfig:
        for name, head in self.heads.items():
            if head.scorer not in self.scorers:
                known = ", ".join(sorted(self.scorers)) or "none"
                raise ConfigError(f"heads.{name}.scorer: no scorer {head.scorer!r}; there are {known}")
        if len(self.columns()) != sum(map(len, self._parts())):
            raise ConfigError("two of the scorers and heads make a column of one name; rename one")
        return self

    def columns(self) -> dict[str, Column]:
        """The columns that can be had from here."""
        return {name: column for part in self._parts() for name, column in part.items()}

    def written(self) -> frozenset[str]:
        """The columns that are to be there whether or not a filter reads them."""
        named = {"score": similarity("{}"), "img": "{}_img", "txt": "{}_txt"}
        return frozenset(named[what].format(name) for name, one in self.scorers.items() for what in one.write)

    def _parts(self) -> list[dict[str, Column]]:
        vector = pl.List(pl.Float32())
        parts: list[dict[str, Column]] = []
        for name in self.scorers:
            part = {
                similarity(name): Column(pl.Float32(), "model", f"cosine of image and caption under {name}"),
                f"{name}_img": Column(vector, "model", f"{name}'s embedding of the image"),
                f"{name}_txt": Column(vector, "model", f"{name}'s embedding of the caption"),
            }
            if self.detectors.text is not None:
                about = f"cosine of caption and image without its text under {name}"
                part[similarity(name, masked=True)] = Column(pl.Float32(), "model", about)
            parts.append(part)
        parts += [{head_column(name): Column(pl.Float32(), "model", f"what head {name} gives")} for name in self.heads]
        if self.detectors.text is not None:
            parts.append({TEXT_AREA: Column(pl.Float32(), "model", "share of the image that detected text covers")})
        if self.detectors.faces is not None:
            about = "faces, each x0, y0, x1, y1 as fractions of the sides"
            parts.append({FACES: Column(pl.List(pl.List(pl.Float64())), "model", about)})
        return parts


def head_column(name: str) -> str:
    """The column that the head of this name makes."""
    return f"{name}_score"


@dataclass(frozen=True)
class ScoreJob:
    """One shard to score; sent to a worker process.

    Attributes:
        shard: the tar.
        table: its metadata table.
        output: the parquet file to write.
        columns: what is wanted of `config.columns()`.
        config: the models.
        inputs: local paths of what the config names, by dotted field: `scorers.b32.model`, `heads.nsfw.weights`.
        limits: what an image may weigh.
        only: parquet file with a boolean "keep", row by row as `table`; rows where it is not true stay null.
        device: where models run, as torch names it.
        num_threads: of torch in this process; None leaves it as it is. Scores may differ in the last bits between
            numbers of threads, so give one number wherever results are to be the same.
        index_dir: folder of the shards' indexes; None: beside each.
    """

    shard: Shard
    table: Path
    output: Path
    columns: frozenset[str]
    config: ScoringConfig
    inputs: Mapping[str, Path] = field(default_factory=dict)
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    only: Path | None = None
    device: str = "cpu"
    num_threads: int | None = 1
    index_dir: Path | None = None


def score_shard(job: ScoreJob) -> None:
    """Write the columns of one shard, a row for each row of its table, in its order; models stay loaded.

    The file has "shard", "index" and "caption_index" before the columns, sorted by name, and is whole or absent.

    Raises:
        ConfigError: a column that the config does not make.
        MissingInput: a model, a weights file or a package is not there.
        DamagedInput: one of them cannot be read.
    """
    if missing := job.columns - job.config.columns().keys():
        raise ConfigError(f"no scorer, head or detector makes {', '.join(sorted(missing))}")
    before = torch.get_num_threads()
    torch.set_num_threads(job.num_threads or before)
    try:
        write_parquet(_scores(job), job.output)
    finally:
        torch.set_num_threads(before)  # a stage that trains may come next in this process


def _scores(job: ScoreJob) -> pl.DataFrame:
    table = pl.read_parquet(job.table, columns=list(_READ))
    if job.only is not None:
        keep = pl.read_parquet(job.only, columns=["keep"])["keep"].fill_null(False)
        left_out = pl.when(keep).then(pl.col("unreadable")).otherwise(pl.lit("left out"))
        table = table.with_columns(unreadable=left_out)
    if table["unreadable"].is_null().any():
        pool = Pool(job.shard, index_dir=job.index_dir)
        return score_pairs(pool, table, scoring_of(job), job.limits)
    made = job.config.columns()
    empty = {name: pl.lit(None, made[name].dtype) for name in sorted(job.columns)}
    return table.select(PLACE).with_columns(**empty)


def scoring_of(job: ScoreJob) -> Scoring:
    """The models that a job needs, loaded; those that this process has loaded before are taken as they are."""
    config = job.config
    heads = {head_column(name): name for name in config.heads if head_column(name) in job.columns}
    wanted = {config.heads[name].scorer for name in heads.values()}
    for name in config.scorers:
        if job.columns & {similarity(name), similarity(name, masked=True), f"{name}_img", f"{name}_txt"}:
            wanted.add(name)
    masked = any(similarity(name, masked=True) in job.columns for name in wanted)
    detectors = config.detectors
    return Scoring(
        columns=job.columns,
        encoders={name: _load_encoder(job, name) for name in config.scorers if name in wanted},
        batch_sizes={name: scorer.batch_size for name, scorer in config.scorers.items()},
        heads={column: _load_head(job, name) for column, name in heads.items()},
        text=_detector(_frozen(detectors.text), "text") if masked or TEXT_AREA in job.columns else None,
        faces=_detector(_frozen(detectors.faces), "faces") if FACES in job.columns else None,
        threads=config.decode_threads,
    )


def _load_encoder(job: ScoreJob, name: str) -> TorchEncoder:
    config = job.config.scorers[name]
    return _encoder(_path(job, f"scorers.{name}.model", config.model), config.open_clip, job.device, config.precision)


def _load_head(job: ScoreJob, name: str) -> Head:
    config = job.config.heads[name]
    weights = _path(job, f"heads.{name}.weights", config.weights)
    assert weights is not None
    head = _head(weights, config.layers, config.activation, config.output, config.output_index)

    def apply(embeddings: np.ndarray) -> np.ndarray:
        if embeddings.shape[1] != width_of(head):
            raise ConfigError(
                f"heads.{name}: {weights} reads embeddings of {width_of(head)} numbers, but those of "
                f"{config.scorer} have {embeddings.shape[1]}"
            )
        with torch.inference_mode():
            return head(torch.from_numpy(np.ascontiguousarray(embeddings))).numpy()

    return Head(config.scorer, config.reads, apply)


def _path(job: ScoreJob, name: str, written: str | None) -> Path | None:
    return None if written is None else Path(job.inputs.get(name, written))


@lru_cache(maxsize=32)
def _encoder(folder: Path | None, architecture: str | None, device: str, precision: Precision) -> TorchEncoder:
    return load_encoder(folder, architecture, torch.device(device), precision)


@lru_cache(maxsize=32)
def _head(
    weights: Path, layers: tuple[str, ...], activation: Activation, output: Output, output_index: int
) -> EmbeddingHead:
    return load_head(weights, layers=layers, activation=activation, output=output, output_index=output_index)


@lru_cache(maxsize=8)
def _detector(tree: tuple[str, tuple[tuple[str, Any], ...]] | None, finds: str) -> Detect | None:
    if tree is None:
        return None
    name, parameters = tree
    return parse_detector({name: dict(parameters)}, finds, f"detectors.{finds}").load()


def _frozen(tree: Any) -> tuple[str, tuple[tuple[str, Any], ...]] | None:
    """A detector's tree as something that can be looked up."""
    if tree is None:
        return None
    name, parameters = (tree, None) if isinstance(tree, str) else next(iter(tree.items()))
    return name, tuple(sorted((parameters or {}).items()))
