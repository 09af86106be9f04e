"""The jobs of a filter run: one part of the pool each, done by any process that sees the cache and the pool.

Each job leaves its result in files and hands back a few plain values. A job whose files are there already does nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mmfoundry.data.derived.base import DERIVATIONS, sources_of
from mmfoundry.data.filters.account import IDENTITY_READ, Account, Judgement, account_of, judgement_of
from mmfoundry.data.filters.base import Filter, PoolFilter
from mmfoundry.data.filters.examples import candidates_of
from mmfoundry.data.filters.passes import EVERY_ROW, Standing, columns_of, take_turns
from mmfoundry.data.filters.plan import Plan, Step, Turn, plan_of, uid_operation
from mmfoundry.data.filters.subset import to_subset
from mmfoundry.data.parts import Part
from mmfoundry.data.shard_names import Shard
from mmfoundry.data.table import Request, describe_shard, write_parquet
from mmfoundry.data.table_cache import TableCache, key_of
from mmfoundry.data.uids import high_low

REPEATED = {"uid": pl.String(), "captions": pl.String()}


@dataclass(frozen=True)
class DescribeJob:
    """Make the table of one tar shard.

    Attributes:
        name: of the shard, for errors.
        number: of the shard in the pool.
        table, truth: places in the cache.
    """

    name: str
    number: int
    shard: Shard
    request: Request
    cache: TableCache
    table: Path
    truth: Path


def describe(job: DescribeJob) -> tuple[Counter[str], str]:
    """Returns how many samples cannot be read, by reason, and the key of one of them ("" if there is none)."""
    table = job.cache.get(job.table)
    if table is None:
        table, truth = describe_shard(job.request, job.number, job.shard)
        job.cache.put(job.truth, truth)
        job.cache.put(job.table, table)  # last: where it is, the shard is done
    bad = table.select("index", "key", "unreadable").drop_nulls().unique("index", maintain_order=True)
    return Counter(bad["unreadable"].to_list()), str(bad["key"][0]) if bad.height else ""


@dataclass(frozen=True)
class Judging:
    """What all jobs of one run share; the plan is made once, and anew in a process that a job is sent to.

    Attributes:
        steps: names and filters, in sequence.
        alone: whether each is judged by itself as well.
        pool: digest of the pool and of how its columns are made.
        cache: where partials, states and verdicts lie.
        unique: whether it is taken that no uid comes twice, see `plan_of`; `is_unique` tells whether that was right.
    """

    steps: tuple[Step, ...]
    alone: bool
    pool: str
    cache: TableCache
    unique: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def plan(self) -> Plan:
        """What there is to do."""
        return plan_of(self.steps, self.alone, self.unique)

    def is_unique(self) -> bool:
        """Whether no uid comes twice; known after the first pass."""
        plan = self.plan
        return not _state(self.state_path(plan, Turn(uid_operation(plan), 0))).height

    @cached_property
    def key(self) -> str:
        """What all verdicts depend on besides the part."""
        keys = (self.plan.key(number, self.pool) for number in range(len(self.plan.operations)))
        return key_of(self.pool, self.alone, self.unique, *keys)

    def verdicts_path(self, number: int, part: Part) -> Path:
        """What pass `number` found of a part: verdicts as "v0", "v1" ... by operation, and derived columns."""
        return self.cache.path("verdicts", f"{self.key}-{number}", part.identity)

    def partial_path(self, plan: Plan, turn: Turn, part: Part) -> Path:
        """A part's partial of one round."""
        return self.cache.path("partial", f"{plan.key(turn.operation, self.pool)}-{turn.round}", part.identity)

    def state_path(self, plan: Plan, turn: Turn) -> Path:
        """The state after a round."""
        return self.cache.path("state", plan.key(turn.operation, self.pool), f"{turn.round}")


@dataclass(frozen=True)
class PartJob:
    """Something to do with one part of the pool."""

    judging: Judging
    part: Part

    @property
    def name(self) -> str:
        """The file that the part is of."""
        return self.part.name


@dataclass(frozen=True)
class PassJob(PartJob):
    """Take the turns of pass `number` on one part."""

    number: int


def take_pass(job: PassJob) -> None:
    """Write the part's partials, verdicts and derived columns of the pass."""
    judging, part, cache = job.judging, job.part, job.judging.cache
    plan = judging.plan
    passes = plan.passes()
    turns = [
        turn
        for turn in passes[job.number]
        if turn.round is None or not cache.has(judging.partial_path(plan, turn, part))
    ]
    place = judging.verdicts_path(job.number, part)
    is_judged = cache.has(place)
    if is_judged:
        turns = [turn for turn in turns if turn.round is not None]
    if not turns:
        return
    standing = standing_before(judging, plan, job.number + is_judged, part)
    states: dict[int, list[pl.DataFrame]] = {}
    for turn in turns:
        operation = plan.operations[turn.operation]
        rounds = [Turn(turn.operation, number) for number in range(operation.num_rounds)]
        states[turn.operation] = [_state(judging.state_path(plan, each)) for each in rounds[: turn.round]]
        if turn.round is None:
            paths = [judging.partial_path(plan, each, part) for each in rounds]
            if _foregone(plan, turn, states) is None:
                standing.partials[turn.operation] = [_whole(cache, path) for path in paths]
        for name in [
            name for name, maker in DERIVATIONS.items() if maker.dear and operation.filter.columns() & set(maker.makes)
        ]:
            key = plan.reach_key(turn.operation, judging.pool)
            known = cache.get(cache.path("derived", f"{name}-{key}", part.identity))
            if known is not None:
                standing.derived[name, key] = known
    found_before = set(standing.derived)
    looked_at = [turn for turn in turns if _foregone(plan, turn, states) is None]
    table = part.read(columns_of(plan, looked_at))
    take_turns(plan, turns, table, standing, states, lambda number: plan.reach_key(number, judging.pool))
    for turn in turns:
        if turn.round is not None:
            cache.put(judging.partial_path(plan, turn, part), standing.partials[turn.operation][-1])
    for (name, key), values in standing.derived.items():
        if DERIVATIONS[name].dear and (name, key) not in found_before:
            cache.put(cache.path("derived", f"{name}-{key}", part.identity), values)
    if any(turn.round is None for turn in turns):
        cache.put(place, _found(plan, turns, standing, table.height, judging.pool))


def _foregone(plan: Plan, turn: Turn, states: dict[int, list[pl.DataFrame]]) -> bool | None:
    one = plan.operations[turn.operation].filter
    return one.foregone(states[turn.operation]) if isinstance(one, PoolFilter) and turn.round is None else None


def _found(plan: Plan, turns: Sequence[Turn], standing: Standing, height: int, pool: str) -> pl.DataFrame:
    """Verdicts, and the derived columns of all rows that were reached (null elsewhere)."""
    columns: dict[str, pl.Series] = {}
    for turn in turns:
        if turn.round is not None:
            continue
        columns[f"v{turn.operation}"] = standing.verdicts[turn.operation]
        reached = standing.reached(plan, turn.operation)
        key = plan.reach_key(turn.operation, pool)
        for (_, rows_key), values in standing.derived.items():
            if rows_key in (key, EVERY_ROW):
                for series in values:
                    whole = _on_all_rows(series, None if rows_key == EVERY_ROW else reached, height)
                    before = columns.get(series.name, whole)
                    columns[series.name] = pl.select(pl.coalesce(before, whole)).to_series()
    return pl.DataFrame(columns)


def _on_all_rows(values: pl.Series, rows: pl.Series | None, height: int) -> pl.Series:
    """Values of some rows (None: of all) as a column of all rows, null elsewhere."""
    if rows is None:
        return values
    return pl.Series([None], dtype=values.dtype).new_from_index(0, height).scatter(rows.arg_true(), values)


def standing_before(judging: Judging, plan: Plan, number: int, part: Part) -> Standing:
    """The verdicts that passes before `number` left."""
    standing = Standing()
    for earlier, turns in enumerate(plan.passes()[:number]):
        if any(turn.round is None for turn in turns):
            for series in _whole(judging.cache, judging.verdicts_path(earlier, part)):
                if series.name in (names := {f"v{turn.operation}": turn.operation for turn in turns}):
                    standing.verdicts[names[series.name]] = series
    return standing


def merge(judging: Judging, turn: Turn, parts: Sequence[Part]) -> None:
    """Make one state of all parts' partials of a round."""
    cache, plan = judging.cache, judging.plan
    place = judging.state_path(plan, turn)
    if cache.has(place):
        return
    one: Filter = plan.operations[turn.operation].filter
    assert isinstance(one, PoolFilter)
    assert turn.round is not None
    earlier = [_state(judging.state_path(plan, Turn(turn.operation, number))) for number in range(turn.round)]
    partials = [pl.scan_parquet(judging.partial_path(plan, turn, part), glob=False) for part in parts]
    cache.put(place, one.merge(partials, earlier))


@dataclass(frozen=True)
class KeptJob(PartJob):
    """Write which rows of a part pass all steps, as a boolean column "keep"."""

    output: Path


def write_kept(job: KeptJob) -> None:
    """Write the column; what models compute is computed of these rows alone."""
    if job.judging.cache.has(job.output):
        return
    plan = job.judging.plan
    standing = standing_before(job.judging, plan, len(plan.passes()), job.part)
    judgement = judgement_of(plan, job.part.read(IDENTITY_READ), standing)
    job.judging.cache.put(job.output, judgement.pairs.select("keep"))


@dataclass(frozen=True)
class AccountJob(PartJob):
    """Count what became of one part, and write its kept and dropped rows.

    Attributes:
        outputs: the folder for `kept/` and `dropped/`; None: neither is written.
        columns: written of kept pairs, besides those of identity.
        examples: candidates for pictures a step.
        with_judgement: whether truth is to be told; then the whole judgement comes back.
    """

    outputs: Path | None
    columns: tuple[str, ...]
    examples: int
    seed: int
    with_judgement: bool


@dataclass(frozen=True)
class Counted:
    """What an `AccountJob` hands back.

    Attributes:
        account: of the part.
        subset: kept uids as in `subset.npy`.
        candidates: for examples.
        judgement: where it was asked for.
        repeated: "uid" and "captions" (a digest) of the part's samples whose uid others have as well.
    """

    account: Account
    subset: np.ndarray
    candidates: pl.DataFrame
    judgement: Judgement | None
    repeated: pl.DataFrame


def count(job: AccountJob) -> Counted:
    """Write `kept/NNNNN.parquet` and `dropped/NNNNN.parquet` of a part, if that is wanted, and count it."""
    judging, part = job.judging, job.part
    plan = judging.plan
    standing = standing_before(judging, plan, len(plan.passes()), part)
    table = part.read(IDENTITY_READ)
    judgement = judgement_of(plan, table, standing)
    if job.outputs is not None:
        _write_rows(job, job.outputs, plan, judgement)
    return Counted(
        account_of(judgement),
        to_subset(judgement.samples.filter("kept")["uid"]),
        candidates_of(judgement, job.examples, job.seed),
        judgement if job.with_judgement else None,
        _repeated(judging, plan, part, judgement),
    )


def _repeated(judging: Judging, plan: Plan, part: Part, judgement: Judgement) -> pl.DataFrame:
    """The samples whose uid is not theirs alone; different captions under one uid are a conflict."""
    state = _state(judging.state_path(plan, Turn(uid_operation(plan), 0)))
    if not state.height:
        return pl.DataFrame(schema=REPEATED)
    rows = judgement.pairs.select("index", "uid", *high_low()).join(state, on=["high", "low"], how="semi")
    captions = part.read(["index", "caption"]).join(rows.select("index").unique(), on="index", how="semi")
    of_samples = captions.group_by("index", maintain_order=True).agg("caption")
    texts = [json.dumps(texts) for texts in of_samples["caption"].to_list()]
    digests = [hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in texts]
    said = of_samples.select("index", captions=pl.Series(digests, dtype=pl.String))
    return rows.unique("index", maintain_order=True).join(said, on="index").select(list(REPEATED))


def _write_rows(job: AccountJob, outputs: Path, plan: Plan, judgement: Judgement) -> None:
    part = job.part
    asked = {name for name in job.columns if name not in (*IDENTITY_READ, "caption")}
    table = part.read(sources_of(asked) | set(IDENTITY_READ) | {"caption"})
    rows = table.with_columns(_derived_columns(job.judging, plan, part, asked)).filter(judgement.pairs["keep"])
    named = pl.lit(part.name).alias("shard")
    order = [*IDENTITY_READ[:5], "caption", *sorted(asked & set(rows.columns))]
    write_parquet(rows.select(order).with_columns(named), outputs / "kept" / f"{part.number:05d}.parquet")
    names = pl.Series([name for name, _ in plan.steps], dtype=pl.String)
    dropped = judgement.samples.filter(~pl.col("kept")).select(
        "uid", "key", named, "index", pl.lit(names).gather(pl.col("step")).alias("reason"), "unreadable"
    )
    write_parquet(dropped, outputs / "dropped" / f"{part.number:05d}.parquet")


def _derived_columns(judging: Judging, plan: Plan, part: Part, asked: set[str]) -> list[pl.Series]:
    """The derived columns that passes left, for the rows that they looked at."""
    found: dict[str, list[pl.Series]] = {}
    for number, turns in enumerate(plan.passes()):
        if any(turn.round is None for turn in turns):
            for series in _whole(judging.cache, judging.verdicts_path(number, part)):
                if series.name in asked:
                    found.setdefault(series.name, []).append(series)
    return [pl.select(pl.coalesce(several)).to_series().rename(name) for name, several in found.items()]


def _whole(cache: TableCache, path: Path) -> pl.DataFrame:
    table = cache.get(path)
    if table is None:
        raise FileNotFoundError(f"{path}: not there, or altered, while the run that wrote it goes on")
    return table


@lru_cache(maxsize=4)
def _state(path: Path) -> pl.DataFrame:
    return pl.read_parquet(path)
