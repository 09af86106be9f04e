"""The `filter` stage: a pool of raw image-text shards in, the pairs worth training on out, and the account of both."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import polars as pl
from pydantic import Field, field_validator, model_validator

from mmfoundry.data.columns import COLUMNS
from mmfoundry.data.decode import DecodeLimits
from mmfoundry.data.filters.base import Filter
from mmfoundry.data.filters.examples import examples_of
from mmfoundry.data.filters.funnel import Judgement, funnel_of, judge, steps_of, truth_metrics
from mmfoundry.data.filters.subset import write_subset
from mmfoundry.data.filters.tree import parse_filter
from mmfoundry.data.reader import Pool
from mmfoundry.data.reshard import curated_samples
from mmfoundry.data.scores import Scorer, score_table
from mmfoundry.data.shards import write_shards
from mmfoundry.data.table import (
    Request,
    describe_shards,
    read_table,
    read_truth,
    unreadable_counts,
    unreadable_keys,
    write_parquet,
)
from mmfoundry.pipeline.artifact import Artifact, write_atomic
from mmfoundry.pipeline.config import ArtifactRef, Config, Neutral, ShardsRef, StageConfig
from mmfoundry.pipeline.distributed import barrier
from mmfoundry.pipeline.errors import ConfigError, MmfoundryError, TooManyUnreadable
from mmfoundry.pipeline.stage import RunContext, Stage

if TYPE_CHECKING:
    import torch

SCORED = frozenset(name for name, column in COLUMNS.items() if column.needs == "model")


class ClipScoreConfig(Config):
    """Which CLIP scores the pairs."""

    model: ArtifactRef = Field(description="a CLIP: a pretrain artifact")
    batch_size: int = Field(64, ge=1, description="images a forward pass")


class FilterConfig(StageConfig):
    """Which pairs of a pool go on."""

    pool: ShardsRef = Field(description="raw tars: an artifact, a folder, a tar, a glob, a hub id or a URL")
    filters: dict[str, Any] = Field(description="filter tree, e.g. {all: [{basic: {min_side: 64}}, exact_duplicate]}")
    clip_score: ClipScoreConfig | None = Field(None, description="makes the column clip_score; null: there is none")
    max_unreadable: float = Field(0.01, ge=0, le=1, description="fraction of samples; past it the stage stops")
    max_image_bytes: int = Field(64 << 20, gt=0, description="encoded size past which an image counts as unreadable")
    max_image_pixels: int = Field(64_000_000, gt=0, description="width x height past which it counts as unreadable")
    reshard: bool = Field(True, description="write the kept samples into new shards, beside the list of their uids")
    max_shard_samples: int = Field(10_000, ge=1, description="samples a new shard, at most")
    max_shard_bytes: int = Field(1 << 30, ge=1, description="bytes a new shard, at most")
    examples: int = Field(12, ge=0, description="pictures kept, and as many dropped, shown for each filter")
    unseen_kinds: list[str] = Field(
        default_factory=list,
        description="kinds of known bad pairs (`truth`) that these filters cannot see: left out of bad_dropped",
    )
    num_workers: Annotated[int | None, Neutral()] = Field(
        None, ge=1, description="processes a rank; null: one a core if it pays"
    )

    @field_validator("filters")
    @classmethod
    def _parses(cls, filters: dict[str, Any]) -> dict[str, Any]:
        parse_filter(filters)
        return filters

    @model_validator(mode="after")
    def _has_scorer(self) -> FilterConfig:
        wanted = self.tree().columns() & SCORED
        if wanted and self.clip_score is None:
            raise ConfigError(f"a filter reads {', '.join(wanted)}, which needs clip_score.model")
        return self

    def tree(self) -> Filter:
        """The filter tree."""
        return parse_filter(self.filters)

    def limits(self) -> DecodeLimits:
        """What an image may weigh."""
        return DecodeLimits(max_bytes=self.max_image_bytes, max_pixels=self.max_image_pixels)


def run(config: FilterConfig, context: RunContext) -> Artifact:
    """Write the kept samples and the account; shards described by an earlier, cut-off run are not read again.

    Writes `subset.npy` (kept uids in DataComp's format), `shards/`, `kept/*.parquet`, `dropped.parquet` (with the step
    that dropped each), `funnel.json`, `examples.parquet`, and `table/*.parquet`, the metadata of the whole pool.

    Raises:
        MissingInput: the pool is not there or has no readable sample.
        TooManyUnreadable: past `max_unreadable`; the message counts samples by reason.
        MmfoundryError: nothing is kept.
    """
    pool = Pool(context.shards("pool"), name=config.pool)
    tree = config.tree()
    request = Request(tree.columns(), config.limits(), context.work)
    unreadable = describe(config, context, pool, request)
    if request.columns & SCORED:
        score(config, context, pool, request)
    barrier(context.runtime.group)
    if not context.runtime.is_main:
        return context.finish({})
    table = read_table(request, len(pool.shards))
    judgement = judge(steps_of(tree), table)
    funnel = funnel_of(judgement, read_truth(request, len(pool.shards)), config.unseen_kinds)
    funnel |= {"shards": [shard.name for shard in pool.shards], "damaged": dict(sorted(damage_in(pool).items()))}
    write_atomic(context.work / "funnel.json", json.dumps(funnel, indent=1, ensure_ascii=False) + "\n")
    if not funnel["kept"]:
        worst = max(funnel["filters"], key=lambda row: row["sequence"]["dropped"])
        raise MmfoundryError(
            f"{config.pool}: no sample of {funnel['samples']} passes the filters; {worst['name']} drops "
            f"{worst['sequence']['dropped']} of the {worst['sequence']['in']} that reach it: loosen it"
        )
    write_selection(config, context, pool, table, judgement)
    samples = funnel["samples"] + sum(funnel["damaged"].values())
    metrics = {
        "samples": samples,
        "kept": funnel["kept"],
        "dropped": samples - funnel["kept"],
        "captions_kept": funnel["captions_kept"],
        "unreadable": unreadable / samples,
        "samples_per_second": samples / context.seconds(),
        **truth_metrics(funnel["truth"]),
    }
    context.log.say(_summary(metrics))
    return context.finish(metrics)


def describe(config: FilterConfig, context: RunContext, pool: Pool, request: Request) -> int:
    """Write the table of every shard, each rank its share; returns how many samples of the pool cannot be read.

    Raises:
        TooManyUnreadable: past the limit, as soon as that is certain.
    """
    asked = Request(request.columns - SCORED, request.limits, request.folder)
    damaged = damage_in(pool)
    total = len(pool) + damaged.total()
    found = Counter(damaged)

    def check(shard: int) -> None:
        found.update(unreadable_counts(asked, shard))
        if found.total() > config.max_unreadable * total:
            counts = ", ".join(f"{count} x {reason}" for reason, count in found.most_common())
            keys = unreadable_keys(asked, shard)
            example = f"; for one, {keys[0]} in {pool.shards[shard].name}" if keys else ""
            raise TooManyUnreadable(
                f"{config.pool}: {found.total()} of {total} samples cannot be read ({counts}{example}); max_unreadable "
                f"allows {config.max_unreadable:.2%}: repair the pool or raise it"
            )

    mine = list(enumerate(pool.indexes))[context.runtime.rank :: context.runtime.world_size]
    check_shards = {shard for shard, _ in mine}
    with context.progress(sum(len(index) for _, index in mine), "filter: looking at samples") as bar:

        def done(shard: int) -> None:
            bar.advance(len(pool.indexes[shard]))
            check(shard)

        describe_shards(asked, mine, config.num_workers, done)
    barrier(context.runtime.group)
    for shard in range(len(pool.shards)):  # what other ranks found counts as well
        if shard not in check_shards:
            check(shard)
    return found.total()


def damage_in(pool: Pool) -> Counter[str]:
    """What the shards' indexes could not read, by reason; each counts as one sample."""
    return Counter(damage.reason for _, damage in pool.damage)


def score(config: FilterConfig, context: RunContext, pool: Pool, request: Request) -> None:
    """Write the model's scores of every shard, each rank its share, and join them to the shard's table."""
    assert config.clip_score is not None  # the config's validator saw to it
    scorer = clip_scorer(context.inputs["clip_score.model"], context.runtime.device)
    mine = range(context.runtime.rank, len(pool.shards), context.runtime.world_size)
    with context.progress(sum(len(pool.indexes[shard]) for shard in mine), "filter: scoring pairs") as bar:
        for shard in mine:
            path = request.scores_path(shard)
            if not path.is_file():
                table = pl.read_parquet(request.table_path(shard))
                scores = score_table(pool, table, "clip_score", scorer, config.clip_score.batch_size, request.limits)
                write_parquet(scores, path)
            bar.advance(len(pool.indexes[shard]))


def clip_scorer(folder: Path, device: torch.device) -> Scorer:
    """Cosines of images and captions under one of our CLIPs.

    Raises:
        MissingInput: there is no CLIP in the folder.
        DamagedInput: it cannot be read.
    """
    import torch

    from mmfoundry.data.text import clip_tokenizer
    from mmfoundry.data.transforms import EvalTransform
    from mmfoundry.models.io import load_clip

    model = load_clip(folder).to(device)
    transform = EvalTransform(model.config.vision_cfg.image_size)
    tokenize = clip_tokenizer(model.config.text_cfg.context_length)

    @torch.inference_mode()
    def scores(images: Sequence[np.ndarray], captions: Sequence[Sequence[str]]) -> list[np.ndarray]:
        pixels = torch.from_numpy(np.stack([transform(image) for image in images]))
        tokens = torch.from_numpy(tokenize([caption for of_image in captions for caption in of_image]))
        image_bD = model.encode_image(model.pixels(pixels.to(device)))
        text_cD = model.encode_text(tokens.to(device))
        owner_c = torch.tensor([i for i, of_image in enumerate(captions) for _ in of_image], device=device)
        cosines = (image_bD[owner_c] * text_cD).sum(-1).cpu().numpy()
        return np.split(cosines, np.cumsum([len(of_image) for of_image in captions])[:-1])

    return scores


def write_selection(
    config: FilterConfig, context: RunContext, pool: Pool, table: pl.DataFrame, judgement: Judgement
) -> None:
    """Write what is kept, as uids, rows and shards, and what is dropped, with its reason."""
    names = pl.Series([shard.name for shard in pool.shards], dtype=pl.String)
    named = pl.lit(names).gather(pl.col("shard")).alias("shard")
    kept, samples = judgement.pairs["keep"], judgement.samples
    write_subset(samples.filter("kept")["uid"], context.work / "subset.npy")
    for (shard,), rows in table.filter(kept).group_by("shard", maintain_order=True):
        write_parquet(rows.with_columns(named), context.work / "kept" / f"{shard:05d}.parquet")
    dropped = samples.filter(~pl.col("kept")).select("uid", "key", named, "index", "reason", "unreadable")
    write_parquet(dropped, context.work / "dropped.parquet")
    examples = examples_of(judgement, pool, config.examples, config.seed, config.limits())
    write_parquet(examples, context.work / "examples.parquet")
    if config.reshard:
        curated = curated_samples(pool, judgement.pairs.filter("keep"))
        write_shards(
            curated, context.work / "shards", max_count=config.max_shard_samples, max_bytes=config.max_shard_bytes
        )


def _summary(metrics: dict[str, float]) -> str:
    text = f"filter: kept {metrics['kept']:.0f} of {metrics['samples']:.0f} samples"
    if "bad_dropped" in metrics:
        text += f"; of the known bad pairs that these filters can see {metrics['bad_dropped']:.1%} dropped"
    if "good_dropped" in metrics:
        text += f"; of the good ones {metrics['good_dropped']:.1%} lost"
    return text


STAGE = Stage("filter", FilterConfig, run, "choose the pairs of a pool that are worth training on")
