"""What a filter tree does to a pool, step by step: who dropped what, alone and in sequence.

A pool may say in its JSON, under `truth`, which pairs are bad and how. That is read here, after the fact, to tell how
many of them were dropped and how many good ones were lost; no filter sees it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from mmfoundry.data.filters.base import Filter, name_of
from mmfoundry.data.filters.basic import Readable
from mmfoundry.data.filters.combine import in_sequence
from mmfoundry.data.filters.dedup import UniqueUid

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


@dataclass(frozen=True)
class Judgement:
    """The verdicts of a tree's steps on a table.

    Attributes:
        steps: names and filters, in sequence.
        pairs: "uid", "shard", "index", "caption_index" and "keep" (bool), in the order of the table.
        samples: one row a sample, in the order of the pool: "uid", "key", "shard", "index", "unreadable", "kept" and
            "reason" (the step that dropped its last pair; null if kept).
        alone: bool (samples, steps): whether a step by itself keeps at least one pair of the sample.
        unjudged: bool (samples, steps): whether a step cannot judge any pair of the sample; such a one is not kept.
        pairs_alone: pairs that each step by itself keeps.
        pairs_after: pairs left after each step of the sequence.
    """

    steps: list[Step]
    pairs: pl.DataFrame
    samples: pl.DataFrame
    alone: np.ndarray
    unjudged: np.ndarray
    pairs_alone: list[int]
    pairs_after: list[int]

    @property
    def names(self) -> list[str]:
        """Names of the steps."""
        return [name for name, _ in self.steps]


def judge(steps: Sequence[Step], table: pl.DataFrame) -> Judgement:
    """Apply steps to a table, each alone and all in sequence.

    Args:
        steps: from `steps_of`.
        table: the metadata table with every column that the steps read, in the order of the pool.
    """
    filters = [one for _, one in steps]
    verdicts = [verdict.fill_null(False) for verdict in in_sequence(filters, table)]
    step = pl.Series("step", [None], dtype=pl.UInt32).new_from_index(0, table.height)
    for number, verdict in reversed(list(enumerate(verdicts))):  # the first step that did not keep the row
        step = pl.select(pl.when(verdict).then(step).otherwise(pl.lit(number, pl.UInt32)).alias("step")).to_series()
    masks = [one.keep(table) for one in filters]
    rows = table.select("uid", "key", "shard", "index", "caption_index", "unreadable").with_columns(
        step, *(mask.alias(f"alone{number}") for number, mask in enumerate(masks))
    )
    names = pl.Series([name for name, _ in steps], dtype=pl.String)
    samples = (
        rows.group_by("shard", "index", maintain_order=True)
        .agg(
            pl.col("uid", "key", "unreadable").first(),
            kept=pl.col("step").is_null().any(),
            step=pl.col("step").max(),
            alone=pl.concat_list(pl.col(f"alone{number}").any() for number in range(len(masks))),
            unjudged=pl.concat_list(pl.col(f"alone{number}").is_null().all() for number in range(len(masks))),
        )
        .with_columns(reason=pl.when(~pl.col("kept")).then(pl.lit(names).gather(pl.col("step"))))
    )
    return Judgement(
        steps=list(steps),
        pairs=rows.select("uid", "shard", "index", "caption_index", keep=pl.col("step").is_null()),
        samples=samples.select("uid", "key", "shard", "index", "unreadable", "kept", "reason"),
        alone=np.array(samples["alone"].to_list(), bool).reshape(samples.height, len(steps)),
        unjudged=np.array(samples["unjudged"].to_list(), bool).reshape(samples.height, len(steps)),
        pairs_alone=[int(mask.sum()) for mask in masks],
        pairs_after=[int(verdict.sum()) for verdict in verdicts],
    )


def funnel_of(judgement: Judgement, truth: pl.DataFrame, unseen_kinds: Collection[str] = ()) -> dict[str, Any]:
    """The funnel as plain values; docs/filter.md describes it.

    Args:
        judgement: from `judge`.
        truth: "uid", "bad" (null: a good pair), "of" (uid of what a duplicate repeats); may be empty.
        unseen_kinds: kinds of bad pairs that the rules cannot see; counted by kind but not in `bad_dropped`.
    """
    samples, names = judgement.samples, judgement.names
    left = samples.height
    rows = []
    for number, (name, one) in enumerate(judgement.steps):
        dropped = int((samples["reason"] == name).sum())
        kept_alone = int(judgement.alone[:, number].sum())
        unjudged = int(judgement.unjudged[:, number].sum())
        rows.append(
            {
                "name": name,
                "parameters": one.model_dump(mode="json"),
                "alone": {
                    "kept": kept_alone,
                    "dropped": samples.height - kept_alone - unjudged,
                    "unjudged": unjudged,
                    "captions_kept": judgement.pairs_alone[number],
                },
                "sequence": {
                    "in": left,
                    "kept": left - dropped,
                    "dropped": dropped,
                    "captions_kept": judgement.pairs_after[number],
                },
            }
        )
        left -= dropped
    dropped_alone = (~judgement.alone & ~judgement.unjudged).astype(np.int64)
    reasons = samples["unreadable"].drop_nulls().value_counts(sort=True)
    return {
        "samples": samples.height,
        "captions": judgement.pairs["caption_index"].len() - judgement.pairs["caption_index"].null_count(),
        "kept": int(samples["kept"].sum()),
        "captions_kept": int(judgement.pairs["keep"].sum()),
        "filters": rows,
        "overlap": {"filters": names, "dropped_by_both": (dropped_alone.T @ dropped_alone).tolist()},
        "unreadable": {row["unreadable"]: row["count"] for row in reasons.sort("unreadable").to_dicts()},
        "truth": _against_truth(judgement, truth, unseen_kinds) if truth.height else None,
    }


def _against_truth(judgement: Judgement, truth: pl.DataFrame, unseen_kinds: Collection[str]) -> dict[str, Any]:
    """How the tree, and each step alone, did on pairs of which it is known whether they are bad.

    Of a pair and its duplicate either may stay. So the duplicate counts as dropped when one of the two is, and a good
    pair as lost when neither it nor a duplicate of it is left.
    """
    uids = judgement.samples["uid"].to_list()
    place = {uid: number for number, uid in enumerate(uids)}
    said = [row for row in truth.to_dicts() if row["uid"] in place]
    copies: dict[int, list[int]] = {}
    for row in said:
        if row["bad"] is not None and row["of"] in place:
            copies.setdefault(place[row["of"]], []).append(place[row["uid"]])
    masks = np.column_stack([judgement.alone | judgement.unjudged, judgement.samples["kept"].to_numpy()])

    def dropped(row: dict[str, Any]) -> np.ndarray:
        here = place[row["uid"]]
        if row["bad"] is None:
            return np.asarray(~masks[[here, *copies.get(here, [])]].any(axis=0))
        return np.asarray(~masks[[here, place[row["of"]]] if row["of"] in place else [here]].all(axis=0))

    kinds: dict[str | None, list[np.ndarray]] = {}
    for row in said:
        kinds.setdefault(row["bad"], []).append(dropped(row))
    names = judgement.names

    def summary(outcomes: list[np.ndarray], by: str) -> dict[str, Any]:
        counts = np.sum(outcomes, axis=0).tolist() if outcomes else [0] * (len(names) + 1)
        by_filter = {name: count for name, count in zip(names, counts, strict=False) if count}
        return {"samples": len(outcomes), "dropped": counts[-1], by: by_filter}

    bad = {kind: summary(kinds[kind], "dropped_by") for kind in sorted(kind for kind in kinds if kind is not None)}
    for kind, found in bad.items():
        found["seen"] = kind not in unseen_kinds
    return {"bad": bad, "good": summary(kinds.get(None, []), "dropped_by")}


def truth_metrics(truth: dict[str, Any] | None) -> dict[str, float]:
    """Fractions of bad pairs dropped (of the kinds that the rules can see, and by kind) and of good ones lost."""
    if truth is None:
        return {}
    metrics = {f"bad_dropped_{kind}": found["dropped"] / found["samples"] for kind, found in truth["bad"].items()}
    seen = [found for found in truth["bad"].values() if found["seen"]]
    if seen:
        metrics["bad_dropped"] = sum(found["dropped"] for found in seen) / sum(found["samples"] for found in seen)
    if truth["good"]["samples"]:
        metrics["good_dropped"] = truth["good"]["dropped"] / truth["good"]["samples"]
    return metrics
