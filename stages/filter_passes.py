"""The work of the `filter` stage on the parts of a pool: tables of shards, then pass after pass, then the account."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from mmfoundry.data.derived.base import PACKAGED, Models
from mmfoundry.data.executors import Executor, make_executor
from mmfoundry.data.filter_jobs import (
    Counted,
    DescribeJob,
    Judging,
    Wanted,
    count,
    describe,
    merge,
    take_pass,
    write_kept,
)
from mmfoundry.data.filters.plan import Step, Turn, uid_operation
from mmfoundry.data.index import ShardIndex
from mmfoundry.data.new_shards import ReshardOptions, shard_jobs, write
from mmfoundry.data.parts import Part, TablePart
from mmfoundry.data.reader import Pool
from mmfoundry.data.shard_names import shown
from mmfoundry.data.table import Request
from mmfoundry.data.table_cache import TableCache, key_of
from mmfoundry.pipeline.distributed import barrier
from mmfoundry.pipeline.errors import TooManyUnreadable
from mmfoundry.pipeline.stage import RunContext
from mmfoundry.stages.filter_scorers import ScoreJob, ScoringConfig, score_shard

J = TypeVar("J")
R = TypeVar("R")
_SMALL_POOL = 5000  # samples; below it, starting processes takes longer than the work


@dataclass(frozen=True)
class Workers:
    """Who does the jobs of one rank.

    Attributes:
        context: of the run; the ranks share out the jobs.
        executor: does this rank's.
    """

    context: RunContext
    executor: Executor

    def map(
        self,
        task: Callable[[J], R],
        jobs: Sequence[J],
        done: Callable[[int, R], None] | None = None,
        *,
        gpus: float = 0.0,
    ) -> None:
        """Do this rank's share of jobs, and wait for the others; `done` is called with number and result of its own."""
        runtime = self.context.runtime
        mine = range(runtime.rank, len(jobs), runtime.world_size)
        finished = done or (lambda number, result: None)
        self.executor.map(task, [jobs[n] for n in mine], lambda place, result: finished(mine[place], result), gpus=gpus)
        barrier(runtime.group)


@contextlib.contextmanager
def workers_for(
    context: RunContext, kind: str, num_workers: int | None, address: str | None, samples: int
) -> Iterator[Workers]:
    """Start those who do the jobs.

    Args:
        context: of the run.
        kind: "local" or "ray".
        num_workers: at a time on this rank; None takes one a core, or this process alone for a small pool.
        address: of a Ray cluster.
        samples: of the pool.
    """
    if num_workers is None and kind == "local":
        num_workers = 1 if samples < _SMALL_POOL else os.cpu_count() or 1
    with make_executor(kind, num_workers, address) as executor:  # type: ignore[arg-type]
        yield Workers(context, executor)


@dataclass
class Unreadable:
    """What cannot be read of a pool, and the limit on it.

    Attributes:
        pool: what the config calls it.
        total: samples of the pool, the lost ones with them.
        limit: fraction past which the run stops.
        found: by reason.
        example: where one of them is.
    """

    pool: str
    total: int
    limit: float
    found: Counter[str] = field(default_factory=Counter)
    example: str = ""

    def add(self, counts: Counter[str], example: str = "") -> None:
        """Count more.

        Raises:
            TooManyUnreadable: past the limit.
        """
        self.found.update(counts)
        self.example = self.example or example
        if self.found.total() > self.limit * self.total:
            said = ", ".join(f"{count} x {reason}" for reason, count in self.found.most_common())
            one = f"; for one, {self.example}" if self.example else ""
            raise TooManyUnreadable(
                f"{self.pool}: {self.found.total()} of {self.total} samples cannot be read ({said}{one}); "
                f"max_unreadable allows {self.limit:.2%}: repair the pool or raise it"
            )


def describe_shards(
    pool: Pool, request: Request, cache: TableCache, workers: Workers, unreadable: Unreadable
) -> list[TablePart]:
    """The parts of a pool of tars; a shard whose table is in the cache is not read again.

    Raises:
        TooManyUnreadable: past the limit, as soon as that is certain.
    """
    key = key_of("table", sorted(request.columns), dataclasses.astuple(request.limits))
    jobs = []
    for number, index in enumerate(pool.indexes):
        identity = _identity(index)
        table, truth = (cache.path(kind, key, identity) for kind in ("table", "truth"))
        jobs.append(DescribeJob(index.shard.name, number, index.shard, request, cache, table, truth))
    context = workers.context
    total = sum(len(index) for index in pool.indexes[context.runtime.rank :: context.runtime.world_size])
    counted = set()
    with context.progress(total, "filter: looking at samples") as bar:

        def done(number: int, result: tuple[Counter[str], str]) -> None:
            counted.add(number)
            bar.advance(len(pool.indexes[number]))
            unreadable.add(result[0], f"{result[1]} in {jobs[number].name}" if result[1] else "")

        workers.map(describe, jobs, done)
    for number, job in enumerate(jobs):  # what other ranks found counts as well
        if number not in counted:
            found, example = describe(job)
            unreadable.add(found, f"{example} in {job.name}" if example else "")
    return [TablePart(job.number, job.name, key_of(key, job.table.stem), (job.table,)) for job in jobs]


def score_shards(
    pool: Pool,
    parts: Sequence[TablePart],
    columns: frozenset[str],
    scoring: ScoringConfig,
    request: Request,
    cache: TableCache,
    workers: Workers,
    before: Sequence[Step] = (),
    derived: Models = PACKAGED,
) -> list[TablePart]:
    """The parts with the columns that models compute; what is in the cache is not computed again.

    Args:
        pool: of tars.
        parts: its parts.
        columns: that are wanted of models.
        scoring: the models.
        request: what else was asked of the shards.
        cache: for the results.
        workers: who does it.
        before: steps that need no model: what they drop is not looked at, and has nulls.
        derived: what derived columns of these steps are made with.
    """
    context = workers.context
    only: list[Path | None] = [None] * len(parts)
    before_key = ""
    if before:
        judging = Judging(tuple(before), False, pool_digest(parts), cache, models=derived)
        before_key = judging.key
        judging = run_passes(judging, parts, workers)
        workers.map(partial(write_kept, judging), parts)
        only = [judging.kept_path(part) for part in parts]
    models = {
        name: path for name, path in context.inputs.items() if name.partition(".")[0] in ScoringConfig.model_fields
    }
    used = scoring.model_dump_json(exclude={"decode_threads"})
    key = key_of(
        "scores", before_key, sorted(columns), used, *(f"{n}={context.records[n].digest}" for n in sorted(models))
    )
    jobs, made = [], []
    for part in parts:
        output = cache.path("scores", key_of(key, part.identity), "scores")
        made.append(dataclasses.replace(part, identity=key_of(key, part.identity), tables=(*part.tables, output)))
        index = pool.indexes[part.number]
        job = ScoreJob(
            shard=index.shard,
            table=part.tables[0],
            output=output,
            columns=columns,
            config=scoring,
            inputs=models,
            limits=request.limits,
            only=only[part.number],
            device=str(context.runtime.device),
            index_dir=request.index_dir,
        )
        jobs.append(job)
    mine = range(context.runtime.rank, len(jobs), context.runtime.world_size)
    with context.progress(sum(len(pool.indexes[n]) for n in mine), "filter: scoring pairs") as bar:
        gpus = float(context.runtime.device.type == "cuda")
        workers.map(partial(score_into, cache), jobs, lambda n, _: bar.advance(len(pool.indexes[n])), gpus=gpus)
    return made


def score_into(cache: TableCache, job: ScoreJob) -> None:
    """Score a shard, unless the cache has it."""
    if not cache.has(job.output):
        score_shard(job)
        cache.seal(job.output)


def truth_of_pool(parts: Sequence[TablePart]) -> pl.DataFrame:
    """What the pool's samples say about themselves under `truth`."""
    return pl.concat([pl.read_parquet(_truth_path(part.tables[0])) for part in parts])


def _truth_path(table: Path) -> Path:
    return table.parents[2] / "truth" / table.parent.name / table.name


def _identity(index: ShardIndex) -> str:
    """Tells a shard by its name, size, and time or version; not by its folder."""
    shard = index.shard
    version = shard.stat().st_mtime_ns if isinstance(shard, Path) else f"{shown(shard)} {index.identity}"
    return key_of(shard.name, index.shard_bytes, version)


def pool_digest(parts: Sequence[Part]) -> str:
    """Tells a pool by its parts."""
    return key_of(*(part.identity for part in parts))


def run_passes(judging: Judging, parts: Sequence[Part], workers: Workers) -> Judging:
    """Judge the parts, pass after pass.

    Returns:
        What was carried out: it is tried first as if no uid came twice, which saves a pass, and begun anew if one does.
    """
    tried = dataclasses.replace(judging, unique=True)
    if _run_passes(tried, parts, workers):
        return tried
    _run_passes(judging, parts, workers)
    return judging


def _run_passes(judging: Judging, parts: Sequence[Part], workers: Workers) -> bool:
    """False where uids come twice although it was taken that none does."""
    context = workers.context
    plan = judging.plan
    passes, asked = plan.passes(), Turn(uid_operation(plan), 0)
    if context.runtime.world_size == 1:
        passes = passes[:-1]  # whoever asks for all verdicts takes the last one
    with context.progress(len(passes) * len(parts), "filter: judging", "parts") as bar:
        for number, turns in enumerate(passes):
            workers.map(partial(take_pass, judging, number), parts, lambda *_: bar.advance(context.runtime.world_size))
            if context.runtime.is_main:
                for turn in turns:
                    if turn.round is not None:
                        merge(judging, turn, parts, workers.executor)
            barrier(context.runtime.group)
            if judging.unique and asked in turns and not judging.is_unique():
                return False
    return True


def count_parts(
    judging: Judging,
    parts: Sequence[Part],
    outputs: Path | None,
    columns: Sequence[str],
    examples: int,
    truth: bool,
    workers: Workers,
) -> list[Counted] | None:
    """Write the kept and dropped rows of the parts and count them; on the main rank, what was counted, by part."""
    context = workers.context
    wanted = Wanted(outputs, tuple(columns), examples, context.config.seed, truth)
    found: dict[int, Counted] = {}
    if context.runtime.is_main:  # it needs all results, and they come back only to whoever asked for them
        with context.progress(len(parts), "filter: writing tables", "parts") as bar:

            def done(number: int, counted: Counted) -> None:
                found[number] = counted
                bar.advance()

            workers.executor.map(partial(count, judging, wanted), parts, done)
    barrier(context.runtime.group)
    return [found[number] for number in range(len(parts))] if context.runtime.is_main else None


def write_new_shards(
    pool: Pool, rows: pl.DataFrame, folder: Path, options: ReshardOptions, workers: Workers, unreadable: Unreadable
) -> None:
    """Write samples of a pool into new shards; on the main rank only.

    Raises:
        TooManyUnreadable: past the limit, samples that could be read before cannot any more.
    """
    jobs = shard_jobs(pool, rows, folder, options)
    with workers.context.progress(rows.height, "filter: writing shards") as bar:

        def done(number: int, result: tuple[int, Counter[str]]) -> None:
            bar.advance(jobs[number].rows.height)
            unreadable.add(result[1])

        workers.executor.map(write, jobs, done)


def repeated_uids(counted: Sequence[Counted]) -> dict[str, Any]:
    """How many uids stand for more than one sample, how many samples that are, and whose captions differ."""
    repeated = pl.concat([one.repeated for one in counted])
    by_uid = repeated.group_by("uid").agg(pl.col("captions").n_unique()).sort("uid")
    conflicting = by_uid.filter(pl.col("captions") > 1)["uid"]
    return {
        "uids": by_uid.height,
        "samples": repeated.height,
        "conflicting": len(conflicting),
        "examples": conflicting.head(10).to_list(),
    }
