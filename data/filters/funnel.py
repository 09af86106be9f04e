"""The account of a filter run as plain values: who dropped what, alone and in sequence, and how that fits the truth.

A pool may say in its JSON, under `truth`, which pairs are bad and how. That is read here, after the fact, to tell how
many of them were dropped and how many good ones were lost; no filter sees it.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import polars as pl

from mmfoundry.data.filters.account import Account, Judgement
from mmfoundry.data.filters.plan import Step


def funnel_of(
    steps: Sequence[Step],
    account: Account,
    judgements: Sequence[Judgement] = (),
    truth: pl.DataFrame | None = None,
    unseen_kinds: Collection[str] = (),
) -> dict[str, Any]:
    """The funnel as plain values; docs/filter.md describes it.

    Args:
        steps: names and filters.
        account: of the whole pool.
        judgements: of the parts in which truth or what it speaks of may lie; read only where there is truth.
        truth: "uid", "bad" (null: a good pair), "of" (uid of what a duplicate repeats); may be empty.
        unseen_kinds: kinds of bad pairs that the rules cannot see; counted by kind but not in `bad_dropped`.
    """
    left = account.samples
    rows = []
    for number, (name, one) in enumerate(steps):
        dropped = int(account.dropped[number]) if account.dropped.size else 0
        row: dict[str, Any] = {"name": name, "parameters": one.model_dump(mode="json"), "alone": None}
        if account.has_alone and account.kept_alone.size:
            kept, unjudged = int(account.kept_alone[number]), int(account.unjudged_alone[number])
            row["alone"] = {
                "kept": kept,
                "dropped": account.samples - kept - unjudged,
                "unjudged": unjudged,
                "captions_kept": int(account.captions_alone[number]),
            }
        row["sequence"] = {
            "in": left,
            "kept": left - dropped,
            "dropped": dropped,
            "captions_kept": int(account.captions_after[number]) if account.captions_after.size else 0,
        }
        rows.append(row)
        left -= dropped
    names = [name for name, _ in steps]
    has_truth = truth is not None and truth.height and account.has_alone
    return {
        "samples": account.samples,
        "captions": account.captions,
        "kept": account.kept,
        "captions_kept": account.captions_kept,
        "filters": rows,
        "overlap": {"filters": names, "dropped_by_both": account.overlap.tolist()} if account.has_alone else None,
        "unreadable": dict(sorted(account.unreadable.items())),
        "truth": _against_truth(names, judgements, truth, unseen_kinds) if has_truth and truth is not None else None,
    }


def _against_truth(
    names: list[str], judgements: Sequence[Judgement], truth: pl.DataFrame, unseen_kinds: Collection[str]
) -> dict[str, Any]:
    """How the tree, and each step alone, did on pairs of which it is known whether they are bad.

    Of a pair and its duplicate either may stay. So the duplicate counts as dropped when one of the two is, and a good
    pair as lost when neither it nor a duplicate of it is left.
    """
    place = {uid: number for number, uid in enumerate(uid for one in judgements for uid in one.samples["uid"])}
    said = [row for row in truth.to_dicts() if row["uid"] in place]
    copies: dict[int, list[int]] = {}
    for row in said:
        if row["bad"] is not None and row["of"] in place:
            copies.setdefault(place[row["of"]], []).append(place[row["uid"]])
    masks = np.concatenate([_not_dropped(one) for one in judgements])

    def dropped(row: dict[str, Any]) -> np.ndarray:
        here = place[row["uid"]]
        if row["bad"] is None:
            return np.asarray(~masks[[here, *copies.get(here, [])]].any(axis=0))
        return np.asarray(~masks[[here, place[row["of"]]] if row["of"] in place else [here]].all(axis=0))

    kinds: dict[str | None, list[np.ndarray]] = {}
    for row in said:
        kinds.setdefault(row["bad"], []).append(dropped(row))

    def summary(outcomes: list[np.ndarray], by: str) -> dict[str, Any]:
        counts = np.sum(outcomes, axis=0).tolist() if outcomes else [0] * (len(names) + 1)
        by_filter = {name: count for name, count in zip(names, counts, strict=False) if count}
        return {"samples": len(outcomes), "dropped": counts[-1], by: by_filter}

    bad = {kind: summary(kinds[kind], "dropped_by") for kind in sorted(kind for kind in kinds if kind is not None)}
    for kind, found in bad.items():
        found["seen"] = kind not in unseen_kinds
    return {"bad": bad, "good": summary(kinds.get(None, []), "dropped_by")}


def _not_dropped(one: Judgement) -> np.ndarray:
    """bool (samples, steps + 1): each step by itself, and all in sequence."""
    assert one.alone is not None
    assert one.unjudged is not None
    return np.column_stack([one.alone | one.unjudged, one.samples["kept"].to_numpy()])


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
