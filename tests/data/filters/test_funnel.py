"""data/filters/funnel.py: every sample is accounted for, once."""

from typing import Any

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfoundry.data.filters.account import Account, Judgement, account_of, judgement_of
from mmfoundry.data.filters.funnel import funnel_of, truth_metrics
from mmfoundry.data.filters.passes import judge_parts
from mmfoundry.data.filters.plan import Step, steps_of
from mmfoundry.data.filters.tree import parse_filter
from mmfoundry.data.table import TRUTH_SCHEMA
from tests.data.filters.rows import table, uid

TREE = {"all": [{"basic": {"min_side": 10}}, {"any": ["not_blank", {"min_side": 50}]}, "exact_duplicate", "basic"]}
NO_TRUTH = pl.DataFrame(schema=TRUTH_SCHEMA)


def judge(steps: list[Step], rows: pl.DataFrame) -> Judgement:
    plan, standings = judge_parts(steps, [rows])
    return judgement_of(plan, rows, standings[0])


def funnel_of_one(
    steps: list[Step], judgement: Judgement, truth: pl.DataFrame = NO_TRUTH, **more: Any
) -> dict[str, Any]:
    return funnel_of(steps, account_of(judgement), [judgement], truth, **more)


def pair(sample: int, **columns: Any) -> dict[str, Any]:
    good = {
        "caption_words": 5,
        "caption_characters": 20,
        "language": "en",
        "width": 300,
        "height": 300,
        "pixel_deviation": 9.0,
        "sha256": sample.to_bytes(32, "big"),
    }
    return {"uid": uid(sample), "key": str(sample), "index": sample} | good | columns


def truth(*rows: tuple[int, str | None, int | None]) -> pl.DataFrame:
    said = [(uid(sample), bad, None if of is None else uid(of)) for sample, bad, of in rows]
    return pl.DataFrame(said, schema=TRUTH_SCHEMA, orient="row")


def test_steps_are_opened_and_named() -> None:
    names = [name for name, _ in steps_of(parse_filter(TREE))]
    assert names[:4] == ["readable", "unique_uid", "basic.caption_words", "basic.caption_characters"]
    assert names[7:9] == ["any", "exact_duplicate"]
    assert names[9] == "basic.caption_words#2"
    assert [name for name, _ in steps_of(parse_filter("readable"))] == ["unique_uid", "readable"]


def test_a_sample_falls_where_its_last_pair_falls() -> None:
    rows = table(
        pair(0),
        pair(0, caption_index=1, language="fr"),
        pair(1, caption_words=1),
        pair(1, caption_index=1, language="fr"),
        pair(2, caption_words=1),
        pair(3, width=5),
        pair(4, unreadable="damaged image"),
    )
    judgement = judge(steps_of(parse_filter("basic")), rows)
    reasons = [None if step is None else judgement.names[step] for step in judgement.samples["step"]]
    assert reasons == [None, "basic.language", "basic.caption_words", "basic.min_side", "readable"]
    assert judgement.samples["kept"].to_list() == [True, False, False, False, False]
    assert judgement.pairs["keep"].to_list() == [True, False, False, False, False, False, False]


columns = st.fixed_dictionaries(
    {
        "caption_words": st.sampled_from([1, 5]),
        "language": st.sampled_from(["en", "fr", None]),
        "width": st.sampled_from([5, 40, 300, None]),
        "pixel_deviation": st.sampled_from([0.0, 9.0]),
        "sha256": st.sampled_from([b"a", b"b", b"c", b"d"]),
        "unreadable": st.sampled_from([None, None, None, "damaged image"]),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(columns, min_size=1, max_size=3), max_size=12))
def test_the_account_adds_up_and_agrees_with_the_tree(samples: list[list[dict[str, Any]]]) -> None:
    rows = table(*(pair(n, caption_index=i, **one) for n, pairs in enumerate(samples) for i, one in enumerate(pairs)))
    tree = parse_filter(TREE)
    judgement = judge(steps_of(tree), rows)
    funnel = funnel_of_one(steps_of(tree), judgement)
    assert funnel["samples"] == len(samples)
    left = len(samples)
    for step in funnel["filters"]:
        assert sum(step["alone"][part] for part in ("kept", "dropped", "unjudged")) == len(samples)
        assert step["sequence"]["in"] == left
        left = step["sequence"]["kept"]
        assert step["sequence"]["dropped"] == step["sequence"]["in"] - left
    assert left == funnel["kept"] == judgement.samples["kept"].sum()
    assert judgement.samples["step"].null_count() == left
    # the same pairs as the tree itself keeps among what can be read
    readable = rows.filter(pl.col("unreadable").is_null())
    kept = readable.filter(tree.keep(readable)).select("uid", "caption_index")
    assert kept.equals(judgement.pairs.filter("keep").select("uid", "caption_index"))
    both = funnel["overlap"]["dropped_by_both"]
    assert [both[i][i] for i in range(len(both))] == [step["alone"]["dropped"] for step in funnel["filters"]]
    assert all(both[i][j] == both[j][i] for i in range(len(both)) for j in range(len(both)))


def test_known_bad_pairs_are_counted_by_kind_and_filter() -> None:
    rows = table(pair(0), pair(1, language="fr"), pair(2, language="fr"), pair(3), pair(4, width=5, height=5), pair(5))
    said = truth((0, None, None), (1, "language", None), (2, None, None), (3, "language", None), (4, "small", None))
    steps = steps_of(parse_filter("basic"))
    funnel = funnel_of_one(steps, judge(steps, rows), said, unseen_kinds=["small"])
    assert funnel["truth"] == {
        "bad": {
            "language": {"samples": 2, "dropped": 1, "dropped_by": {"basic.language": 1}, "seen": True},
            "small": {"samples": 1, "dropped": 1, "dropped_by": {"basic.min_side": 1}, "seen": False},
        },
        "good": {"samples": 2, "dropped": 1, "dropped_by": {"basic.language": 1}},
    }
    expected = {"bad_dropped_language": 0.5, "bad_dropped_small": 1.0, "bad_dropped": 0.5, "good_dropped": 0.5}
    assert truth_metrics(funnel["truth"]) == expected


def test_of_a_pair_and_its_copy_either_may_stay() -> None:
    """The copy has the smaller uid, so the original goes: nothing good is lost, and nothing is there twice."""
    rows = table(pair(5, sha256=b"x"), pair(1, sha256=b"x"), pair(2), pair(3, sha256=b"y"))
    said = truth((5, None, None), (1, "copy", 5), (2, None, None), (3, "copy", 2))
    steps = steps_of(parse_filter("exact_duplicate"))
    judgement = judge(steps, rows)
    assert judgement.samples["kept"].to_list() == [False, True, True, True]
    found = funnel_of_one(steps, judgement, said)["truth"]
    assert found["good"] == {"samples": 2, "dropped": 0, "dropped_by": {}}
    assert (found["bad"]["copy"]["samples"], found["bad"]["copy"]["dropped"]) == (2, 1)


def test_no_truth_no_metrics() -> None:
    steps = steps_of(parse_filter("basic"))
    funnel = funnel_of_one(steps, judge(steps, table(pair(0))))
    assert funnel["truth"] is None
    assert truth_metrics(None) == {}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(columns, min_size=1, max_size=3), max_size=12), st.lists(st.integers(0, 12), max_size=3))
def test_a_pool_in_parts_has_the_account_of_the_whole(samples: list[list[dict[str, Any]]], cuts: list[int]) -> None:
    steps = steps_of(parse_filter(TREE))
    pairs = [pair(n, caption_index=i, **one) for n, pairs in enumerate(samples) for i, one in enumerate(pairs)]
    whole = table(*pairs)
    ends = sorted({min(cut, len(samples)) for cut in cuts} | {len(samples)})
    parts = []
    for start, end in zip([0, *ends], ends, strict=False):
        rows = table(*(row | {"shard": len(parts)} for row in pairs if start <= row["index"] < end))
        parts.append(rows)
    plan, standings = judge_parts(steps, parts)
    judgements = [judgement_of(plan, rows, standing) for rows, standing in zip(parts, standings, strict=True)]
    expected = judge(steps, whole)
    assert pl.concat([one.pairs for one in judgements]).drop("shard").equals(expected.pairs.drop("shard"))
    total = sum((account_of(one) for one in judgements), Account())
    assert funnel_of(steps, total) == funnel_of(steps, account_of(expected))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(columns, min_size=1, max_size=3), max_size=12))
def test_without_the_account_of_each_alone_the_same_is_kept(samples: list[list[dict[str, Any]]]) -> None:
    rows = table(*(pair(n, caption_index=i, **one) for n, pairs in enumerate(samples) for i, one in enumerate(pairs)))
    steps = steps_of(parse_filter(TREE))
    plan, standings = judge_parts(steps, [rows], alone=False)
    quick = judgement_of(plan, rows, standings[0])
    assert quick.pairs.equals(judge(steps, rows).pairs)
    funnel = funnel_of(steps, account_of(quick))
    assert [step["sequence"] for step in funnel["filters"]] == [
        step["sequence"] for step in funnel_of_one(steps, judge(steps, rows))["filters"]
    ]
    assert (funnel["overlap"], {step["alone"] for step in funnel["filters"]}) == (None, {None})
