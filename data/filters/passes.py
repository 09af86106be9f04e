"""One pass of a plan over one part of a pool, in memory; who reads parts and keeps what is found is elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from mmfoundry.data.derived.base import DERIVATIONS, Derivation, Models, derive, sources_of
from mmfoundry.data.filters.base import Filter, PoolFilter
from mmfoundry.data.filters.plan import Plan, Step, Turn, plan_of

EVERY_ROW = "every row"  # in place of a reach key
States = Mapping[int, Sequence[pl.DataFrame]]  # by operation, one a round that is over


@dataclass
class Standing:
    """What is known of one part.

    Attributes:
        verdicts: by operation, on all rows of the part.
        partials: by operation, one a round.
        derived: by derivation's name and the key of the rows it was computed for: those rows' values, in their order.
    """

    verdicts: dict[int, pl.Series] = field(default_factory=dict)
    partials: dict[int, list[pl.DataFrame]] = field(default_factory=dict)
    derived: dict[tuple[str, str], pl.DataFrame] = field(default_factory=dict)

    def reached(self, plan: Plan, number: int) -> pl.Series | None:
        """The rows that reach an operation; None where all do."""
        found: pl.Series | None = None
        for verdict in plan.operations[number].reach:
            kept = verdict.of(self.verdicts).fill_null(False)
            found = kept if found is None else found & kept
        return None if found is None or found.all() else found


def columns_of(plan: Plan, turns: Sequence[Turn]) -> frozenset[str]:
    """The columns of a part, none of them derived, that turns need."""
    filters = [plan.operations[turn.operation].filter for turn in turns]
    asked = sources_of(name for one in filters for name in one.columns())
    # a table without any column would not know how many rows it has
    return asked | {"uid"} if any(one.needs_uid for one in filters) else asked or frozenset({"index"})


def take_turns(
    plan: Plan,
    turns: Sequence[Turn],
    table: pl.DataFrame,
    standing: Standing,
    states: States,
    reach_key: Callable[[int], str],
) -> None:
    """Take turns on one part, adding to what is known of it.

    Args:
        plan: whose turns they are.
        turns: of one pass.
        table: the part's rows with `columns_of(plan, turns)`.
        standing: what earlier passes found; changed.
        states: of all operations that have rounds behind them.
        reach_key: what tells the rows that reach an operation: equal for equal rows.
    """
    for turn in turns:
        number = turn.operation
        operation = plan.operations[number]
        one = operation.filter
        reached = standing.reached(plan, number)
        partials = standing.partials.setdefault(number, [])
        foregone = one.foregone(states.get(number, [])) if isinstance(one, PoolFilter) and turn.round is None else None
        if foregone is not None:
            everywhere = pl.Series("keep", [foregone]).new_from_index(0, table.height)
            standing.verdicts[number] = _where(reached, everywhere)
            continue
        names = _derivations_for(one.columns())
        if type(one).keep is Filter.keep and not any(DERIVATIONS[name].dear for name in names):
            # an expression over columns that cost little: sooner told of all rows than of some that are picked out
            table = _with_derived(table, names, standing, EVERY_ROW, plan.models)
            standing.verdicts[number] = _where(reached, one.keep(table)).rename("keep")
            continue
        needed = sources_of(one.columns()) | ({"uid"} if one.needs_uid else frozenset())
        rows = table.select([name for name in table.columns if name in needed | one.columns()] or table.columns[:1])
        rows = rows if reached is None else rows.filter(reached)
        rows = _with_derived(rows, names, standing, reach_key(number), plan.models)
        if turn.round is not None:
            assert isinstance(one, PoolFilter)
            partials.append(one.partial(rows, states.get(number, [])))
            continue
        if isinstance(one, PoolFilter):
            verdict = one.judge(rows, states.get(number, []), partials).cast(pl.Boolean)
        else:
            verdict = one.keep(rows)
        if reached is not None:
            empty = pl.Series("keep", [None], dtype=pl.Boolean).new_from_index(0, table.height)
            verdict = empty.scatter(reached.arg_true(), verdict)
        standing.verdicts[number] = verdict.rename("keep")


def _where(reached: pl.Series | None, verdict: pl.Series) -> pl.Series:
    """A verdict on all rows, made null for those that are not reached."""
    return verdict if reached is None else verdict.zip_with(reached, pl.Series("keep", [None], dtype=pl.Boolean))


def _with_derived(
    rows: pl.DataFrame, names: Sequence[str], standing: Standing, key: str, models: Models
) -> pl.DataFrame:
    """The rows with the columns of derivations; what was derived of the same rows before is taken from there."""
    for name in names:
        made = standing.derived.get((name, key))
        if made is None:
            maker = DERIVATIONS[name]
            before = rows.columns
            rows = derive(rows, maker.makes, models)
            standing.derived[name, key] = rows.select([each for each in maker.makes if each not in before])
        else:
            rows = rows.with_columns([series for series in made.get_columns() if series.name not in rows.columns])
    return rows


def _derivations_for(columns: frozenset[str]) -> list[str]:
    """The derivations that make these columns, each after those that it reads from."""
    found: dict[str, None] = {}

    def add(one: str, maker: type[Derivation]) -> None:
        for name in _derivations_for(maker.reads):
            found.setdefault(name)
        found.setdefault(one)

    for name, maker in sorted(DERIVATIONS.items()):
        if columns & set(maker.makes):
            add(name, maker)
    return list(found)


def judge_parts(
    steps: Sequence[Step], parts: Sequence[pl.DataFrame], alone: bool = True
) -> tuple[Plan, list[Standing]]:
    """Judge a pool whose parts are all in memory.

    Args:
        steps: from `plan.steps_of`.
        parts: tables with every column that the steps read.
        alone: whether each step is judged by itself as well.
    """
    plan = plan_of(steps, alone)
    standings = [Standing() for _ in parts]
    states: dict[int, list[pl.DataFrame]] = {}
    for turns in plan.passes():
        for table, standing in zip(parts, standings, strict=True):
            take_turns(plan, turns, table, standing, states, lambda number: plan.reach_key(number, ""))
        for turn in turns:
            if turn.round is not None:
                state_of = plan.operations[turn.operation].filter
                assert isinstance(state_of, PoolFilter)
                partials = [standing.partials[turn.operation][turn.round].lazy() for standing in standings]
                earlier = states.setdefault(turn.operation, [])
                earlier.append(state_of.merge(partials, list(earlier)))
    return plan, standings
