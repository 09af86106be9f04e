"""From a filter tree to operations: what is judged, on which rows, and in how many passes over the pool.

A tree is opened into its leaves. Each becomes an operation with the rows that reach it, told by the verdicts of
operations before it. Filters that look at rows by themselves are applied as soon as their rows are known; one that
looks at the whole pool ends a pass for every round that it needs. Operations that do not wait for each other share
passes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import polars as pl

from mmfoundry.data.derived.base import PACKAGED, Models, files_of
from mmfoundry.data.filters.base import Filter, PoolFilter, name_of
from mmfoundry.data.filters.basic import Readable
from mmfoundry.data.filters.combine import All, AnyOf, Not, and_then
from mmfoundry.data.filters.dedup import UniqueUid
from mmfoundry.data.table_cache import key_of
from mmfoundry.pipeline.artifact import fingerprint

Step = tuple[str, Filter]


def steps_of(tree: Filter) -> list[Step]:
    """The steps of a tree, each with a name of its own.

    What was found unreadable, and a second sample of a uid, are dropped first, whether or not the tree says so (but
    only where it says `readable` is every image decoded to find out). A sequence
    (`all`, `basic`) is opened into its parts; `any` and `not` are one step. A name that comes again gets a number.
    """
    steps = _opened(name_of(tree), tree)
    known = {type(one) for _, one in steps}
    first: list[Step] = [(name_of(one), one) for one in (Readable(), UniqueUid()) if type(one) not in known]
    seen: dict[str, int] = {}
    named = []
    for name, one in first + steps:
        seen[name] = seen.get(name, 0) + 1
        named.append((name if seen[name] == 1 else f"{name}#{seen[name]}", one))
    return named


def _opened(name: str, one: Filter) -> list[Step]:
    parts = one.parts()
    return [step for part_name, part in parts for step in _opened(part_name, part)] if parts else [(name, one)]


Verdicts = Mapping[int, pl.Series]  # by operation; Boolean, null where it cannot judge or a row did not reach it


@dataclass(frozen=True)
class Verdict:
    """How the verdict on a row follows from those of operations.

    Attributes:
        kind: "leaf", or how `parts` are put together: "all", "any", "not".
        leaf: number of the operation, for a leaf.
        parts: what it is made of, otherwise.
    """

    kind: str
    leaf: int = -1
    parts: tuple[Verdict, ...] = ()

    def of(self, verdicts: Verdicts) -> pl.Series:
        """The verdict on each row."""
        if self.kind == "leaf":
            return verdicts[self.leaf]
        series = [part.of(verdicts) for part in self.parts]
        if self.kind == "not":
            return ~series[0]
        found = series[0]
        for later in series[1:]:
            found = and_then(found, later) if self.kind == "all" else found | later
        return found

    def leaves(self) -> Iterator[int]:
        """The operations that it follows from."""
        if self.kind == "leaf":
            yield self.leaf
        for part in self.parts:
            yield from part.leaves()


@dataclass(frozen=True)
class Operation:
    """One filter, applied to those rows of the pool for which all of `reach` is true."""

    filter: Filter
    reach: tuple[Verdict, ...]

    @property
    def num_rounds(self) -> int:
        """Rounds in which it looks at the whole pool; 0 for one that judges rows by themselves."""
        return self.filter.num_rounds if isinstance(self.filter, PoolFilter) else 0

    def waits_for(self) -> set[int]:
        """The operations whose verdicts tell which rows reach it."""
        return {leaf for verdict in self.reach for leaf in verdict.leaves()}


@dataclass(frozen=True)
class Turn:
    """What is done with an operation in a pass: a round's partial, or, with `round` None, the verdict."""

    operation: int
    round: int | None = None


@dataclass
class Plan:
    """What there is to do for a list of steps.

    Attributes:
        steps: names and filters, in sequence.
        operations: each waits only for ones before it.
        in_sequence: the verdict of each step on what reaches it.
        alone: the verdict of each step on the whole pool; empty where nobody asked for it.
        models: what derived columns are made with.
    """

    steps: list[Step]
    operations: list[Operation] = field(default_factory=list)
    in_sequence: list[Verdict] = field(default_factory=list)
    alone: list[Verdict] = field(default_factory=list)
    models: Models = PACKAGED
    _keys: dict[tuple[int, str], str] = field(default_factory=dict, init=False, repr=False)

    def passes(self) -> list[list[Turn]]:
        """The turns of each pass over the pool, in the order in which they must be taken."""
        judged: set[int] = set()
        rounds = [0] * len(self.operations)
        passes = []
        while len(judged) < len(self.operations):
            turns, merged = [], []
            for number, operation in enumerate(self.operations):
                if number in judged or not operation.waits_for() <= judged:
                    continue
                if rounds[number] < operation.num_rounds:
                    turns.append(Turn(number, rounds[number]))
                    merged.append(number)
                else:
                    turns.append(Turn(number))
                    judged.add(number)
            for number in merged:
                rounds[number] += 1
            passes.append(turns)
        return passes

    def key(self, number: int, pool: str) -> str:
        """What an operation's verdicts depend on besides the columns: equal keys, equal verdicts.

        Args:
            number: of the operation.
            pool: digest of the pool and of how its columns are made.
        """
        if (number, pool) in self._keys:
            return self._keys[number, pool]
        operation = self.operations[number]
        said = [name_of(operation.filter), operation.filter.model_dump(mode="json")]
        read = files_of(operation.filter.columns(), self.models)
        said += [content_of(path) for path in (*operation.filter.files(), *read)]
        reach = [self._shape(verdict, pool) for verdict in operation.reach]
        text = json.dumps([said, reach, pool if operation.num_rounds else ""], sort_keys=True)
        self._keys[number, pool] = key_of(text)
        return self._keys[number, pool]

    def reach_key(self, number: int, pool: str) -> str:
        """What the choice of the rows depends on that reach an operation."""
        return key_of(json.dumps([self._shape(verdict, pool) for verdict in self.operations[number].reach]))

    def _shape(self, verdict: Verdict, pool: str) -> list[object]:
        if verdict.kind == "leaf":
            return [self.key(verdict.leaf, pool)]
        return [verdict.kind, *(self._shape(part, pool) for part in verdict.parts)]


def content_of(path: Path) -> str:
    """A digest of a file's content, or of all files in a folder; read once while the file stays as it is."""
    if path.is_dir():
        return hashlib.sha256(
            "".join(content_of(each) for each in sorted(path.rglob("*")) if each.is_file()).encode()
        ).hexdigest()
    state = path.stat()
    return _content(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1024)
def _content(path: Path, size: int, modified: int) -> str:
    return fingerprint(path)


def plan_of(steps: Sequence[Step], alone: bool = True, unique: bool = False, models: Models = PACKAGED) -> Plan:
    """Plan the judging of steps in sequence and, if asked for, of each by itself.

    Where each is judged by itself anyway, a filter that looks at rows one by one is applied once, to all rows; without
    that, it sees only the rows that earlier steps left.

    Args:
        steps: from `steps_of`.
        alone: also judge each by itself.
        unique: no uid comes twice, so that nothing has to wait for `unique_uid`; whoever says so makes sure of it.
        models: what derived columns are made with.
    """
    plan = Plan(list(steps), models=models)
    told: list[Verdict] = []  # those of steps that may drop something
    for _, one in steps:
        before = tuple(told)
        if alone:
            first = len(plan.operations)
            by_itself = _compiled(one, (), plan)
            again = before and any(operation.num_rounds for operation in plan.operations[first:])
            plan.alone.append(by_itself)
            plan.in_sequence.append(_compiled(one, before, plan) if again else by_itself)
        else:
            plan.in_sequence.append(_compiled(one, before, plan))
        if not (unique and isinstance(one, UniqueUid)):
            told.append(plan.in_sequence[-1])
    return plan


def uid_operation(plan: Plan) -> int:
    """The first operation that looks for repeated uids; every plan has one."""
    return next(n for n, operation in enumerate(plan.operations) if isinstance(operation.filter, UniqueUid))


def _compiled(one: Filter, reach: tuple[Verdict, ...], plan: Plan) -> Verdict:
    parts = one.filters if isinstance(one, All) else tuple(part for _, part in one.parts())
    if parts:
        verdicts: list[Verdict] = []
        for part in parts:
            verdicts.append(_compiled(part, (*reach, *verdicts), plan))
        return Verdict("all", parts=tuple(verdicts))
    if isinstance(one, AnyOf):
        return Verdict("any", parts=tuple(_compiled(part, reach, plan) for part in one.filters))
    if isinstance(one, Not):
        return Verdict("not", parts=(_compiled(one.filter, reach, plan),))
    plan.operations.append(Operation(one, reach))
    return Verdict("leaf", leaf=len(plan.operations) - 1)
