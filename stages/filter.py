"""The `filter` stage: a pool of raw image-text pairs in, those worth training on out, and the account of both."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import polars as pl
from pydantic import Field, field_validator, model_validator

from mmfoundry.data.columns import COLUMNS, UID_NUMBERS, column_named, is_similarity, scorer_of
from mmfoundry.data.decode import DecodeLimits
from mmfoundry.data.derived.base import Models, sources_of
from mmfoundry.data.filter_jobs import Counted, Judging
from mmfoundry.data.filters.account import Account
from mmfoundry.data.filters.base import Filter, name_of
from mmfoundry.data.filters.combine import reader_of
from mmfoundry.data.filters.examples import examples_of
from mmfoundry.data.filters.funnel import funnel_of, truth_metrics
from mmfoundry.data.filters.plan import Step, steps_of
from mmfoundry.data.filters.subset import write_subset
from mmfoundry.data.filters.tree import parse_filter
from mmfoundry.data.new_shards import ReshardOptions
from mmfoundry.data.parts import Part, TablePart, metadata_files, metadata_parts
from mmfoundry.data.reader import Pool
from mmfoundry.data.resharding import reshard
from mmfoundry.data.table import Request, write_parquet
from mmfoundry.data.table_cache import TableCache
from mmfoundry.pipeline.artifact import Artifact, write_atomic
from mmfoundry.pipeline.config import ArtifactRef, Neutral, ShardsRef, StageConfig
from mmfoundry.pipeline.distributed import barrier
from mmfoundry.pipeline.errors import MissingInput, MmfoundryError, UnknownColumn
from mmfoundry.pipeline.registry import unknown
from mmfoundry.pipeline.stage import RunContext, Stage
from mmfoundry.stages.filter_passes import (
    Unreadable,
    Workers,
    count_parts,
    describe_shards,
    pool_digest,
    repeated_uids,
    run_passes,
    score_shards,
    truth_of_pool,
    workers_for,
    write_new_shards,
)
from mmfoundry.stages.filter_scorers import ScoringConfig

# columns of every table; `unreadable` is not among them, since only where a filter reads it is every image decoded
ALWAYS_THERE = frozenset({"uid", "key", "shard", "index", "caption_index", "caption", *UID_NUMBERS})


class FilterConfig(ScoringConfig, StageConfig):
    """Which pairs of a pool go on."""

    pool: ShardsRef = Field(
        description="raw tars: an artifact, a folder, a tar, a glob, a hub id or a URL; or DataComp's metadata: a "
        "folder or pattern of parquet files (with their npz beside them)"
    )
    filters: dict[str, Any] = Field(
        description="filter tree, e.g. {all: [{basic: {min_side: 64}}, exact_duplicate]}, or a list, which means `all`"
    )
    alone: bool = Field(
        True,
        description="also judge each filter by itself, on the whole pool, for the account; false: only in sequence, so "
        "that what is dear (language, embeddings) is computed for nothing that an earlier filter dropped",
    )
    language_model: ArtifactRef | None = Field(
        None,
        description="fastText model that tells `language`: lid.176.bin, say, which DataComp takes; null: lid.176.ftz, "
        "which is installed",
    )
    max_unreadable: float = Field(0.01, ge=0, le=1, description="fraction of samples; past it the stage stops")
    max_image_bytes: int = Field(64 << 20, gt=0, description="encoded size past which an image counts as unreadable")
    max_image_pixels: int = Field(64_000_000, gt=0, description="width x height past which it counts as unreadable")
    tables: bool = Field(
        True, description="write the kept and the dropped rows (always done for tars); false: only uids and the account"
    )
    reshard: bool = Field(True, description="write the kept samples into new shards, beside the list of their uids")
    shards: ShardsRef | None = Field(
        None,
        description="where `pool` is metadata: the tars that it tells of; null: only uids come out",
    )
    blur_faces: bool = Field(
        False, description="blur what `face_bboxes` marks in the new shards, as DataComp's downloader does"
    )
    max_shard_samples: int = Field(10_000, ge=1, description="samples a new shard, at most")
    max_shard_bytes: int = Field(1 << 30, ge=1, description="bytes a new shard, at most")
    examples: int = Field(12, ge=0, description="pictures kept, and as many dropped, shown for each filter")
    unseen_kinds: list[str] = Field(
        default_factory=list,
        description="kinds of known bad pairs (`truth`) that these filters cannot see: left out of bad_dropped",
    )
    executor: Annotated[Literal["local", "ray"], Neutral()] = Field(
        "local", description="who does the work: processes of this machine, or a Ray cluster that sees the same files"
    )
    ray_address: Annotated[str | None, Neutral()] = Field(
        None, description="of the cluster, e.g. 10.0.0.1:6379; null: the one that runs on this machine"
    )
    num_workers: Annotated[int | None, Neutral()] = Field(
        None, ge=1, description="parts at a time, a rank; null: one a core (one for a small pool), or the whole cluster"
    )
    index_dir: Annotated[str | None, Neutral()] = Field(
        None, description="folder of the shards' indexes, where theirs is read-only or remote; null: beside each shard"
    )
    cache_dir: Annotated[str | None, Neutral()] = Field(
        None, description="folder for what is dear to find out, so that a changed filter finds it; null: OUTPUT.cache"
    )

    @field_validator("filters", mode="before")
    @classmethod
    def _list_means_all(cls, filters: object) -> object:
        return {"all": filters} if isinstance(filters, list) else filters

    @field_validator("filters")
    @classmethod
    def _parses(cls, filters: dict[str, Any]) -> dict[str, Any]:
        parse_filter(filters)
        return filters

    @model_validator(mode="after")
    def _knows_its_columns(self) -> FilterConfig:
        made = self.columns()
        for name in sorted(self.tree().columns()):
            if name not in made and column_named(name) is None:
                raise UnknownColumn(f"filters: {unknown('column', name, [*COLUMNS, *made])}")
        return self

    def tree(self) -> Filter:
        """The filter tree."""
        return parse_filter(self.filters)

    def further_inputs(self) -> dict[str, str]:
        """The files that filters read."""
        return {f"filters.{number}": str(path) for number, path in enumerate(self.tree().files())}

    def place_of(self, name: str) -> str:
        """Of a file that a filter reads, the filter."""
        file = self.further_inputs().get(name)
        return name if file is None else f"filters: {name_of(reader_of(self.tree(), Path(file)))}"

    def scoring(self) -> ScoringConfig:
        """The models alone."""
        return ScoringConfig.model_validate({name: getattr(self, name) for name in ScoringConfig.model_fields})

    def scored(self) -> frozenset[str]:
        """The columns that models compute for these filters, or for the outputs."""
        made = self.columns().keys()
        return (sources_of(self.tree().columns() | self.outputs()) & made) | self.written()

    def new_shards(self) -> ReshardOptions:
        """How kept samples go into new shards."""
        return ReshardOptions(
            self.max_shard_samples, self.max_shard_bytes, self.max_unreadable, index_dir=self.index_folder()
        )

    def index_folder(self) -> Path | None:
        """Where indexes lie."""
        return Path(self.index_dir) if self.index_dir else None

    def outputs(self) -> frozenset[str]:
        """The columns of `kept/`, besides those that filters read."""
        return self.written() | ({"face_bboxes"} if self.blur_faces else frozenset())

    def limits(self) -> DecodeLimits:
        """What an image may weigh."""
        return DecodeLimits(max_bytes=self.max_image_bytes, max_pixels=self.max_image_pixels)


def run(config: FilterConfig, context: RunContext) -> Artifact:
    """Write the kept samples and the account; what an earlier run found out, and still holds, is not looked at again.

    Writes `subset.npy` (kept uids in DataComp's format), `kept/*.parquet`, `dropped/*.parquet` (with the step that
    dropped each), `funnel.json`, and for a pool of tars `shards/`, `examples.parquet`, and `table/*.parquet`, the
    metadata of the whole pool.

    Raises:
        MissingInput: the pool is not there or has no readable sample.
        UnknownColumn: a filter reads a column that the pool lacks; raised before any sample is read.
        TooManyUnreadable: past `max_unreadable`; the message counts samples by reason.
        MmfoundryError: nothing is kept.
    """
    where = context.shards("pool")
    files = metadata_files(where) if isinstance(where, Path) else []
    return _on_metadata(config, context, files) if files else _on_tars(config, context)


def _on_tars(config: FilterConfig, context: RunContext) -> Artifact:
    pool = Pool(context.shards("pool"), name=config.pool, index_dir=config.index_folder())
    cache, began = _cache(config, context)
    steps = steps_of(config.tree())
    columns = _columns_of_tars(config)
    damaged = Counter(damage.reason for _, damage in pool.damage)
    unreadable = Unreadable(config.pool, len(pool) + damaged.total(), config.max_unreadable)
    unreadable.add(damaged)
    with workers_for(context, config.executor, config.num_workers, config.ray_address, len(pool)) as workers:
        request = Request(columns - ALWAYS_THERE, config.limits(), config.index_folder())
        parts = describe_shards(pool, request, cache, workers, unreadable)
        if config.scored():
            before = [] if config.alone else _before(steps, config.scored())
            parts = score_shards(
                pool, parts, config.scored(), config.scoring(), request, cache, workers, before, _models(context)
            )
        truth = truth_of_pool(parts)
        judging, counted = _judge(config, context, steps, parts, cache, workers, bool(truth.height))
        if counted is None:
            return context.finish({})
        funnel = _account(config, context, judging, parts, counted, damaged, truth)
        candidates = pl.concat([one.candidates for one in counted])
        examples = examples_of(candidates, [name for name, _ in steps], pool, config.examples, config.limits())
        write_parquet(examples, context.work / "examples.parquet")
        for part in parts:
            _link(part.tables[0], context.work / "table" / f"{part.number:05d}.parquet")
        if config.reshard:
            rows = _kept_rows(context.work / "kept", len(parts), config.blur_faces)
            if config.blur_faces and not rows["face_bboxes"].count():
                raise MissingInput(
                    f"blur_faces: {config.pool} says of no kept sample where faces are (face_bboxes in its JSON): give "
                    "detectors.faces"
                )
            write_new_shards(pool, rows, context.work / "shards", config.new_shards(), workers, unreadable)
    return _finish(config, context, cache, began, funnel, unreadable.found.total())


def _on_metadata(config: FilterConfig, context: RunContext, files: Sequence[Path]) -> Artifact:
    cache, began = _cache(config, context)
    steps = steps_of(config.tree())
    parts, broken = metadata_parts(files, sources_of(config.tree().columns() | config.outputs()))
    rows = [part.count for part in parts]
    lost = sum(rows) // max(len(files) - len(broken), 1)  # a broken file counts as the others do on average
    damaged = Counter({"metadata file cannot be read": lost * len(broken)}) if broken else Counter()
    unreadable = Unreadable(config.pool, sum(rows) + damaged.total(), config.max_unreadable)
    unreadable.add(damaged, f"{next(iter(broken))}: {next(iter(broken.values()))}" if broken else "")
    with workers_for(context, config.executor, config.num_workers, config.ray_address, sum(rows)) as workers:
        judging, counted = _judge(config, context, steps, parts, cache, workers, False)
        if counted is None:
            return context.finish({})
        for one in counted:
            unreadable.add(one.account.unreadable)
        if config.shards is None or not config.reshard:
            workers.executor.dismiss()
        funnel = _account(config, context, judging, parts, counted, damaged, None)
        if config.reshard and config.shards is not None:
            _reshard_by_uid(config, context, workers)
    return _finish(config, context, cache, began, funnel, unreadable.found.total())


def _models(context: RunContext) -> Models:
    return Models(language=context.inputs.get("language_model"))


def _before(steps: Sequence[Step], scored: frozenset[str]) -> list[Step]:
    """The steps ahead of the first that reads what a model computes."""
    reads = (bool(sources_of(one.columns()) & scored) for _, one in steps)
    return [step for step, _ in itertools.takewhile(lambda pair: not pair[1], zip(steps, reads, strict=True))]


def _columns_of_tars(config: FilterConfig) -> frozenset[str]:
    """What has to be found out about each sample without a model.

    Raises:
        UnknownColumn: a filter reads what only a model can tell, and none is configured.
    """
    columns = sources_of(config.tree().columns() | config.outputs()) - config.scored()
    for name in sorted(columns):
        known = column_named(name)
        if known is not None and known.needs == "model" and not is_similarity(name):
            way_out = f"scorers.{scorer_of(name)}" if scorer_of(name) else "detectors or heads"
            raise UnknownColumn(f"a filter reads {name}, which takes a model: give {way_out}")
    return columns


def _judge(
    config: FilterConfig,
    context: RunContext,
    steps: Sequence[Step],
    parts: Sequence[Part],
    cache: TableCache,
    workers: Workers,
    truth: bool,
) -> tuple[Judging, list[Counted] | None]:
    judging = Judging(tuple(steps), config.alone, pool_digest(parts), cache, models=_models(context))
    judging = run_passes(judging, parts, workers)
    columns = sorted(config.tree().columns() | config.outputs())
    of_tars = any(isinstance(part, TablePart) for part in parts)
    outputs = context.work if of_tars or config.tables or config.blur_faces else None
    examples = config.examples if of_tars else 0  # metadata has no pictures to show
    return judging, count_parts(judging, parts, outputs, columns, examples, truth and config.alone, workers)


def _account(
    config: FilterConfig,
    context: RunContext,
    judging: Judging,
    parts: Sequence[Part],
    counted: Sequence[Counted],
    damaged: Counter[str],
    truth: pl.DataFrame | None,
) -> dict[str, Any]:
    """Write `funnel.json` and `subset.npy`.

    Raises:
        MmfoundryError: nothing is kept.
    """
    account = sum((one.account for one in counted), Account())
    judgements = [one.judgement for one in counted if one.judgement is not None]
    funnel = funnel_of(judging.steps, account, judgements, truth, config.unseen_kinds)
    names = list(dict.fromkeys(part.name for part in parts))
    funnel |= {"shards": names, "damaged": dict(sorted(damaged.items())), "repeated_uids": repeated_uids(counted)}
    write_atomic(context.work / "funnel.json", json.dumps(funnel, indent=1, ensure_ascii=False) + "\n", sync=False)
    if not funnel["kept"]:
        raise MmfoundryError(
            f"{config.pool}: no sample of {funnel['samples']} passes the filters; {_why(judging, funnel)}"
        )
    write_subset(np.concatenate([one.subset for one in counted]), context.work / "subset.npy")
    if funnel["repeated_uids"]["conflicting"]:
        found = funnel["repeated_uids"]
        context.log.say(
            f"filter: {found['conflicting']} uids stand for samples of different captions, e.g. "
            f"{found['examples'][0]}; of each the first in the pool counts"
        )
    return funnel


def _why(judging: Judging, funnel: dict[str, Any]) -> str:
    """Which step is to blame where nothing is kept: one that has nothing to judge by, or the one that drops most."""
    for (name, step), row in zip(judging.steps, funnel["filters"], strict=True):
        reads = sorted(step.columns() - ALWAYS_THERE - {"unreadable"})
        if row["alone"] and row["alone"]["unjudged"] == funnel["samples"] and reads:
            scorers = [f"scorers.{made}" for one in reads if (made := scorer_of(one))]
            way_out = f"; {' and '.join(scorers)} would compute it" if scorers else ""
            return f"{name} can judge none, as no sample has a value of {', '.join(reads)}{way_out}"
    worst = max(funnel["filters"], key=lambda row: row["sequence"]["dropped"])
    dropped, reached = worst["sequence"]["dropped"], worst["sequence"]["in"]
    return f"{worst['name']} drops {dropped} of the {reached} that reach it: loosen it"


def _finish(
    config: FilterConfig, context: RunContext, cache: TableCache, began: float, funnel: dict[str, Any], unreadable: int
) -> Artifact:
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
    cache.drop_unused(began)
    return context.finish(metrics)


def _cache(config: FilterConfig, context: RunContext) -> tuple[TableCache, float]:
    """The cache, and the time of its disk at which this run began (the earlier parts of a cut-off run included)."""
    output = context.output
    cache = TableCache(Path(config.cache_dir) if config.cache_dir else output.with_name(f"{output.name}.cache"))
    cache.folder.mkdir(parents=True, exist_ok=True)
    mark = cache.folder / "used"
    mark.write_text(f"{time.time()}\n", encoding="ascii")
    began = mark.stat().st_mtime
    barrier(context.runtime.group)  # nobody may begin before the mark was made
    return cache, began


def _link(path: Path, place: Path) -> None:
    """Have a file of the cache in the artifact; it is not written twice where the disk can do that."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        os.link(path, place)
    except OSError:
        write_atomic(place, path.read_bytes())


def _kept_rows(kept: Path, parts: int, faces: bool) -> pl.DataFrame:
    """The samples of the new shards: uid, place, the captions that stay and, if they are to be blurred, the faces."""
    columns = ["uid", "index", "caption_index", *(["face_bboxes"] if faces else [])]
    found = []
    for number in range(parts):
        rows = pl.read_parquet(kept / f"{number:05d}.parquet", columns=columns)
        samples = rows.group_by("index", maintain_order=True).agg(
            pl.col("uid", *columns[3:]).first(), pl.col("caption_index").alias("captions")
        )
        found.append(samples.with_columns(shard=pl.lit(number, pl.UInt32)))
    return pl.concat(found)


def _reshard_by_uid(config: FilterConfig, context: RunContext, workers: Workers) -> None:
    """New shards from tars beside the metadata, by the uids that are kept."""
    pool = Pool(context.shards("shards"), name=config.shards or "", index_dir=config.index_folder())
    options = dataclasses.replace(config.new_shards(), faces=context.work / "kept" if config.blur_faces else None)
    found = reshard(pool, context.work / "subset.npy", context.work / "shards", workers.executor, options)
    context.log.say(
        f"filter: {found.written} samples in {found.shards} new shards; {found.missing} of the kept uids are not in "
        f"{config.shards}"
    )


def _summary(metrics: dict[str, float]) -> str:
    text = f"filter: kept {metrics['kept']:.0f} of {metrics['samples']:.0f} samples"
    if "bad_dropped" in metrics:
        text += f"; of the known bad pairs that these filters can see {metrics['bad_dropped']:.1%} dropped"
    if "good_dropped" in metrics:
        text += f"; of the good ones {metrics['good_dropped']:.1%} lost"
    return text


STAGE = Stage("filter", FilterConfig, run, "choose the pairs of a pool that are worth training on")
