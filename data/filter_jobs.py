"""The jobs of a filter run: one part of the pool each, done by any process that sees the cache and the pool.

Each job leaves its result in files and hands back a few plain values. A job whose files are there already does nothing.
What all parts share comes with the task (`functools.partial`), which a worker process is sent once, not with each part.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mmfoundry.data.crew import Crew
from mmfoundry.data.derived.base import DERIVATIONS, PACKAGED, Models, derive, files_of, sources_of
from mmfoundry.data.executors import Executor
from mmfoundry.data.filters.account import COUNTED, IDENTITY_READ, Account, Judgement, account_of, judgement_of
from mmfoundry.data.filters.base import Filter, PoolFilter, SharedMerge
from mmfoundry.data.filters.basic import Readable
from mmfoundry.data.filters.examples import candidates_of
from mmfoundry.data.filters.passes import Standing, columns_of, take_turns
from mmfoundry.data.filters.plan import Plan, Step, Turn, content_of, plan_of, uid_operation
from mmfoundry.data.filters.subset import pairs_of_numbers, to_subset
from mmfoundry.data.parts import Part
from mmfoundry.data.shard_names import Shard
from mmfoundry.data.table import Request, describe_shard, write_parquet
from mmfoundry.data.table_cache import TableCache, key_of

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
        models: what derived columns are made with.
    """

    steps: tuple[Step, ...]
    alone: bool
    pool: str
    cache: TableCache
    unique: bool = False
    models: Models = PACKAGED

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def plan(self) -> Plan:
        """What there is to do."""
        return plan_of(self.steps, self.alone, self.unique, self.models)

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
        """What pass `number` found of a part: verdicts as "v0", "v1" ... by operation."""
        return self.cache.path("verdicts", f"{self.key}-{number}", part.identity)

    def kept_path(self, part: Part) -> Path:
        """Which rows of a part pass all steps."""
        return self.cache.path("kept", self.key, part.identity)

    def derived_path(self, plan: Plan, name: str, number: int, part: Part) -> Path:
        """What a derivation made of the rows of a part that reach an operation."""
        key = plan.reach_key(number, self.pool)
        if files := files_of(DERIVATIONS[name].makes, self.models):
            key = key_of(key, *map(content_of, files))
        return self.cache.path("derived", f"{name}-{key}", part.identity)

    def partial_path(self, plan: Plan, turn: Turn, part: Part) -> Path:
        """A part's partial of one round."""
        return self.cache.path("partial", f"{plan.key(turn.operation, self.pool)}-{turn.round}", part.identity)

    def state_path(self, plan: Plan, turn: Turn) -> Path:
        """The state after a round."""
        return self.cache.path("state", plan.key(turn.operation, self.pool), f"{turn.round}")


def take_pass(judging: Judging, number: int, part: Part) -> None:
    """Write the part's partials and verdicts of pass `number`."""
    cache = judging.cache
    plan = judging.plan
    turns = [
        turn
        for turn in plan.passes()[number]
        if turn.round is None or not cache.has(judging.partial_path(plan, turn, part))
    ]
    place = judging.verdicts_path(number, part)
    is_judged = cache.has(place)
    if is_judged:
        turns = [turn for turn in turns if turn.round is not None]
    if not turns:
        return
    standing = standing_before(judging, plan, number + is_judged, part)
    _take_turns(judging, plan, turns, part, standing)
    for turn in turns:
        if turn.round is not None:
            cache.put(judging.partial_path(plan, turn, part), standing.partials[turn.operation][-1])
    if any(turn.round is None for turn in turns):
        cache.put(place, _verdicts(turns, standing))


def _take_turns(judging: Judging, plan: Plan, turns: Sequence[Turn], part: Part, standing: Standing) -> None:
    """Take turns on a part; what is dear to derive is taken from the cache, or left there."""
    cache = judging.cache
    states: dict[int, list[pl.DataFrame]] = {}
    for turn in turns:
        operation = plan.operations[turn.operation]
        rounds = [Turn(turn.operation, number) for number in range(operation.num_rounds)]
        states[turn.operation] = [_state(judging.state_path(plan, each)) for each in rounds[: turn.round]]
        if turn.round is None and _foregone(plan, turn, states) is None:
            paths = [judging.partial_path(plan, each, part) for each in rounds]
            standing.partials[turn.operation] = [_whole(cache, path) for path in paths]
        for name in _dear(operation.filter.columns()):
            known = cache.get(judging.derived_path(plan, name, turn.operation, part))
            if known is not None:
                standing.derived[name, plan.reach_key(turn.operation, judging.pool)] = known
    found_before = set(standing.derived)
    looked_at = [turn for turn in turns if _foregone(plan, turn, states) is None]
    table = part.read(columns_of(plan, looked_at))
    take_turns(plan, turns, table, standing, states, lambda number: plan.reach_key(number, judging.pool))
    for turn in turns:
        for name in _dear(plan.operations[turn.operation].filter.columns()):
            key = name, plan.reach_key(turn.operation, judging.pool)
            if key in standing.derived and key not in found_before:
                cache.put(judging.derived_path(plan, name, turn.operation, part), standing.derived[key])
                found_before.add(key)


def _dear(columns: frozenset[str]) -> list[str]:
    """The derivations worth keeping on a disk that make some of these columns."""
    return [name for name, maker in DERIVATIONS.items() if maker.dear and columns & set(maker.makes)]


def _foregone(plan: Plan, turn: Turn, states: dict[int, list[pl.DataFrame]]) -> bool | None:
    one = plan.operations[turn.operation].filter
    return one.foregone(states[turn.operation]) if isinstance(one, PoolFilter) and turn.round is None else None


def _verdicts(turns: Sequence[Turn], standing: Standing) -> pl.DataFrame:
    numbers = [turn.operation for turn in turns if turn.round is None]
    return pl.DataFrame({f"v{number}": standing.verdicts[number] for number in numbers})


def standing_before(judging: Judging, plan: Plan, number: int, part: Part) -> Standing:
    """The verdicts that passes before `number` left."""
    standing = Standing()
    for earlier, turns in enumerate(plan.passes()[:number]):
        if any(turn.round is None for turn in turns):
            _add_verdicts(standing, _whole(judging.cache, judging.verdicts_path(earlier, part)))
    return standing


def _add_verdicts(standing: Standing, table: pl.DataFrame) -> None:
    standing.verdicts |= {int(series.name.removeprefix("v")): series for series in table}


def standing_after(judging: Judging, part: Part) -> Standing:
    """All verdicts on a part; the last pass is taken here, unless its verdicts lie in the cache.

    They are kept there only where that is worth it: for what is cheap, writing and reading costs more than judging.
    """
    plan, cache = judging.plan, judging.cache
    turns, number = plan.passes()[-1], len(plan.passes()) - 1
    standing = standing_before(judging, plan, number, part)
    known = cache.get(judging.verdicts_path(number, part))
    if known is not None:
        _add_verdicts(standing, known)
        return standing
    _take_turns(judging, plan, turns, part, standing)
    if any(plan.operations[turn.operation].filter.dear for turn in turns):
        cache.put(judging.verdicts_path(number, part), _verdicts(turns, standing))
    return standing


def merge(judging: Judging, turn: Turn, parts: Sequence[Part], executor: Executor) -> None:
    """Make one state of all parts' partials of a round; `executor`'s workers help where there is work for them."""
    cache, plan = judging.cache, judging.plan
    place = judging.state_path(plan, turn)
    if cache.has(place):
        return
    one: Filter = plan.operations[turn.operation].filter
    assert isinstance(one, PoolFilter)
    assert turn.round is not None
    earlier = [_state(judging.state_path(plan, Turn(turn.operation, number))) for number in range(turn.round)]
    partials = [cache.scan(judging.partial_path(plan, turn, part)) for part in parts]
    if not isinstance(one, SharedMerge):
        cache.put(place, one.merge(partials, earlier))
        return
    crew = Crew(cache.folder / "merging" / f"{plan.key(turn.operation, judging.pool)}-{turn.round}", executor)
    cache.put(place, one.merge_with(crew, partials, earlier))
    shutil.rmtree(crew.folder, ignore_errors=True)  # what it shared is in the state now


def write_kept(judging: Judging, part: Part) -> None:
    """Write which rows pass all steps, as a boolean column "keep"; what models compute is computed of these alone."""
    place = judging.kept_path(part)
    if judging.cache.has(place):
        return
    standing = standing_after(judging, part)
    table = _counted(judging, part, standing)
    judgement = judgement_of(judging.plan, table, standing)
    judging.cache.put(place, judgement.pairs.select("keep"))


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a part that is counted.

    Attributes:
        outputs: the folder for `kept/` and `dropped/`; None: neither is written.
        columns: written of kept pairs, besides those of identity.
        examples: candidates for pictures a step.
        seed: of their choice.
        with_judgement: whether truth is to be told; then the whole judgement comes back.
    """

    outputs: Path | None
    columns: tuple[str, ...]
    examples: int
    seed: int
    with_judgement: bool


@dataclass(frozen=True)
class Counted:
    """What became of one part.

    Attributes:
        account: of the part.
        subset: kept uids as in `subset.npy`, sorted.
        candidates: for examples.
        judgement: where it was asked for.
        repeated: "uid" and "captions" (a digest) of the part's samples whose uid others have as well.
    """

    account: Account
    subset: np.ndarray
    candidates: pl.DataFrame
    judgement: Judgement | None
    repeated: pl.DataFrame


def count(judging: Judging, wanted: Wanted, part: Part) -> Counted:
    """Write `kept/NNNNN.parquet` and `dropped/NNNNN.parquet` of a part, if that is wanted, and count it."""
    plan = judging.plan
    standing = standing_after(judging, part)
    names_samples = wanted.outputs is not None or wanted.examples > 0 or wanted.with_judgement
    table = part.read(IDENTITY_READ) if names_samples else _counted(judging, part, standing)
    judgement = judgement_of(plan, table, standing)
    if wanted.outputs is not None:
        _write_rows(judging, wanted.columns, part, wanted.outputs, standing, judgement)
    return Counted(
        account_of(judgement),
        to_subset(pairs_of_numbers(judgement.samples.filter("kept"))),
        candidates_of(judgement, wanted.examples, wanted.seed),
        judgement if wanted.with_judgement else None,
        _repeated(judging, plan, part),
    )


def _counted(judging: Judging, part: Part, standing: Standing) -> pl.DataFrame:
    """`COUNTED` of a part; where all rows can be read, what `unique_uid` knows of them saves reading the uids again."""
    plan = judging.plan
    number = uid_operation(plan)
    after_readable = any(
        isinstance(plan.operations[leaf].filter, Readable) and standing.verdicts[leaf].all()
        for leaf in plan.operations[number].waits_for()
    )
    known = judging.cache.get(judging.partial_path(plan, Turn(number, 0), part)) if after_readable else None
    if known is None:
        return part.read(COUNTED)
    table = part.read(("index", "caption_index"))
    if known.height != table.height:  # samples of several captions
        return part.read(COUNTED)
    return table.with_columns(known["high"], known["low"], unreadable=pl.lit(None, pl.String))


def _repeated(judging: Judging, plan: Plan, part: Part) -> pl.DataFrame:
    """The samples whose uid is not theirs alone; different captions under one uid are a conflict."""
    state = _state(judging.state_path(plan, Turn(uid_operation(plan), 0)))
    if not state.height:
        return pl.DataFrame(schema=REPEATED)
    rows = part.read(["index", "uid", "high", "low", "caption"]).join(state, on=["high", "low"], how="semi")
    of_samples = rows.group_by("index", maintain_order=True).agg(pl.col("uid").first(), "caption")
    texts = [json.dumps(texts) for texts in of_samples["caption"].to_list()]
    digests = [hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in texts]
    return of_samples.select("uid", captions=pl.Series(digests, dtype=pl.String))


def _write_rows(
    judging: Judging, columns: Sequence[str], part: Part, outputs: Path, standing: Standing, judgement: Judgement
) -> None:
    plan = judging.plan
    asked = {name for name in columns if name not in (*IDENTITY_READ, "caption")}
    table = part.read(sources_of(asked) | set(IDENTITY_READ) | {"caption"})
    found = _dear_columns(judging, part, standing, asked, table)
    rows = derive(table.with_columns(found).filter(judgement.pairs["keep"]), asked, plan.models)
    named = pl.lit(part.name).alias("shard")
    order = ["uid", "key", "shard", "index", "caption_index", "caption", *sorted(asked & set(rows.columns))]
    write_parquet(rows.select(order).with_columns(named), outputs / "kept" / f"{part.number:05d}.parquet")
    names = pl.Series([name for name, _ in plan.steps], dtype=pl.String)
    dropped = judgement.samples.filter(~pl.col("kept")).select(
        "uid", "key", named, "index", pl.lit(names).gather(pl.col("step")).alias("reason"), "unreadable"
    )
    write_parquet(dropped, outputs / "dropped" / f"{part.number:05d}.parquet")


def _dear_columns(
    judging: Judging, part: Part, standing: Standing, asked: set[str], table: pl.DataFrame
) -> list[pl.Series]:
    """The dear derived columns, for the rows that filters asked for; null elsewhere."""
    plan = judging.plan
    found: dict[str, pl.Series] = {}
    for number, operation in enumerate(plan.operations):
        for name in _dear(operation.filter.columns() & asked):
            reached = standing.reached(plan, number)
            values = standing.derived.get((name, plan.reach_key(number, judging.pool)))
            if values is None:
                values = judging.cache.get(judging.derived_path(plan, name, number, part))
            if values is None:  # deleted or altered since
                makes = list(DERIVATIONS[name].makes)
                reaching = table if reached is None else table.filter(reached)
                values = derive(reaching, makes, plan.models).select(makes)
            for series in values:
                if series.name in asked:
                    whole = _on_all_rows(series, reached)
                    before = found.get(series.name, whole)
                    found[series.name] = pl.select(pl.coalesce(before, whole)).to_series().rename(series.name)
    return list(found.values())


def _on_all_rows(values: pl.Series, rows: pl.Series | None) -> pl.Series:
    """Values of some rows (None: of all) as a column of all rows, null elsewhere."""
    if rows is None:
        return values
    return (
        pl.Series(values.name, [None], dtype=values.dtype).new_from_index(0, len(rows)).scatter(rows.arg_true(), values)
    )


def _whole(cache: TableCache, path: Path) -> pl.DataFrame:
    table = cache.get(path)
    if table is None:
        raise FileNotFoundError(f"{path}: not there, or altered, while the run that wrote it goes on")
    return table


@lru_cache(maxsize=4)
def _state(path: Path) -> pl.DataFrame:
    return pl.read_ipc(path)
