"""What the steps of a plan did to one part of a pool, and the sums of that over all parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from mmfoundry.data.filters.passes import Standing
from mmfoundry.data.filters.plan import Plan

IDENTITY_READ = ("uid", "high", "low", "key", "shard", "index", "caption_index", "unreadable")
COUNTED = ("high", "low", "index", "caption_index", "unreadable")  # of it, where nobody has to be named


@dataclass(frozen=True)
class Judgement:
    """The verdicts of a plan's steps on one part.

    Attributes:
        names: of the steps, in sequence.
        pairs: `COUNTED` or all of `IDENTITY_READ`, and "keep" (bool), in the order of the part.
        samples: one row a sample, in the order of the part: the same without "caption_index", "kept" and "step" (number
            of the step that dropped its last pair; null if kept).
        alone: bool (samples, steps): whether a step by itself keeps at least one pair of the sample; None if not asked.
        unjudged: bool (samples, steps): whether a step cannot judge any pair of the sample; such a one is not kept.
        pairs_alone: pairs that each step by itself keeps.
        pairs_after: pairs left after each step of the sequence.
    """

    names: list[str]
    pairs: pl.DataFrame
    samples: pl.DataFrame
    alone: np.ndarray | None
    unjudged: np.ndarray | None
    pairs_alone: list[int]
    pairs_after: list[int]


def judgement_of(plan: Plan, table: pl.DataFrame, standing: Standing) -> Judgement:
    """Put a part's verdicts together.

    Args:
        plan: all of whose operations are judged.
        table: the part's rows, with `COUNTED` at least; those of a sample stand together.
        standing: what was found of the part.
    """
    first_row = np.flatnonzero(_starts(table))
    step = np.full(table.height, -1, np.int32)
    left, num_left = np.ones(table.height, bool), table.height
    pairs_after = []
    for number, verdict in enumerate(plan.in_sequence):
        found = verdict.of(standing.verdicts)
        if found.null_count() or not found.all():
            kept = left & _true(found)
            step[left & ~kept] = number  # the first that does not keep the row
            left, num_left = kept, int(np.count_nonzero(kept))
        pairs_after.append(num_left)
    pairs = table.select([name for name in IDENTITY_READ if name in table.columns])
    keep = _of_samples(np.logical_or, left, first_row)
    last = _of_samples(np.maximum, step, first_row)
    samples = pairs.drop("caption_index")
    samples = samples if len(first_row) == table.height else samples[first_row]
    samples = samples.with_columns(
        kept=pl.Series(keep), step=pl.Series(last, dtype=pl.Int32).set(pl.Series(keep), None)
    )
    by_itself = [verdict.of(standing.verdicts) for verdict in plan.alone]
    alone = unjudged = None
    if by_itself:
        alone = _matrix([_of_samples(np.logical_or, _true(mask), first_row) for mask in by_itself], len(first_row))
        unjudged = _matrix(
            [_of_samples(np.logical_and, mask.is_null().to_numpy(), first_row) for mask in by_itself], len(first_row)
        )
    return Judgement(
        names=[name for name, _ in plan.steps],
        pairs=pairs.with_columns(keep=pl.Series(left)),
        samples=samples,
        alone=alone,
        unjudged=unjudged,
        pairs_alone=[int(mask.sum() or 0) for mask in by_itself],
        pairs_after=pairs_after,
    )


def _starts(table: pl.DataFrame) -> np.ndarray:
    """Which rows begin a sample."""
    index = table["index"].to_numpy()
    return np.concatenate([np.ones(min(len(index), 1), bool), index[1:] != index[:-1]])


def _true(verdict: pl.Series) -> np.ndarray:
    return verdict.fill_null(False).to_numpy()


def _of_samples(combine: np.ufunc, values: np.ndarray, first_row: np.ndarray) -> np.ndarray:
    return values if len(values) == len(first_row) else combine.reduceat(values, first_row)


def _matrix(columns: Sequence[np.ndarray], rows: int) -> np.ndarray:
    return np.stack(columns, axis=1) if columns else np.empty((rows, 0), bool)


@dataclass
class Account:
    """Counts over the parts of a pool; those of two parts add up.

    Attributes:
        samples, captions, kept, captions_kept: of the pool, and of what passes all steps.
        dropped: samples that each step drops in the sequence.
        captions_after: pairs left after each step.
        kept_alone, unjudged_alone, captions_alone: what each step does to the whole pool by itself.
        overlap: samples that two steps both drop, each alone: int64 (steps, steps).
        unreadable: samples by reason.
        has_alone: whether the steps were judged by themselves.
    """

    samples: int = 0
    captions: int = 0
    kept: int = 0
    captions_kept: int = 0
    dropped: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    captions_after: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    kept_alone: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    unjudged_alone: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    captions_alone: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    overlap: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    unreadable: Counter[str] = field(default_factory=Counter)
    has_alone: bool = True

    def __add__(self, other: Account) -> Account:
        total = Account(unreadable=self.unreadable + other.unreadable, has_alone=self.has_alone and other.has_alone)
        for name in ("samples", "captions", "kept", "captions_kept"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        for name in ("dropped", "captions_after", "kept_alone", "unjudged_alone", "captions_alone", "overlap"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(total, name, mine + theirs if mine.size and theirs.size else (mine if mine.size else theirs))
        return total


def account_of(judgement: Judgement) -> Account:
    """Count one part."""
    samples, steps = judgement.samples, len(judgement.names)
    account = Account(
        samples=samples.height,
        captions=judgement.pairs.height - judgement.pairs["caption_index"].null_count(),
        kept=int(samples["kept"].sum()),
        captions_kept=int(judgement.pairs["keep"].sum()),
        dropped=np.bincount(samples["step"].drop_nulls().to_numpy(), minlength=steps).astype(np.int64),
        captions_after=np.array(judgement.pairs_after, np.int64),
        unreadable=Counter(dict(samples["unreadable"].drop_nulls().value_counts().iter_rows())),
        has_alone=judgement.alone is not None,
    )
    if judgement.alone is not None and judgement.unjudged is not None:
        by_itself = ~judgement.alone & ~judgement.unjudged
        account.kept_alone = judgement.alone.sum(axis=0, dtype=np.int64)
        account.unjudged_alone = judgement.unjudged.sum(axis=0, dtype=np.int64)
        account.captions_alone = np.array(judgement.pairs_alone, np.int64)
        # counts of a part are below 2**24: sums of float32 are exact, and many times faster than those of integers
        both = by_itself.astype(np.float32)
        account.overlap = (both.T @ both).astype(np.int64)
    return account
