"""data/filters/score.py and top.py against DataComp's rule for a top fraction, in one part and in many."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfoundry.data.filters.score import ClipScore
from mmfoundry.data.filters.top import Top
from mmfoundry.data.filters.tree import parse_filter
from mmfoundry.pipeline.errors import ConfigError, UnknownColumn
from tests.data.filters.cutting import assert_cuts_do_not_matter
from tests.data.filters.rows import table, uid

SCORE = "clip_b32_similarity_score"
NAN = float("nan")


def numpy_keeps(scores: list[float | None], fraction: float) -> list[bool]:
    """The threshold is the score at place int(n f) of those sorted from the highest; ties are kept, NaN sorts last."""
    values = np.array([NAN if score is None else score for score in scores], np.float32)
    place = int(len(values) * fraction)
    threshold = np.float32("-inf") if place == len(values) else -np.sort(-values)[place]
    return (values >= threshold).tolist()


def scored(values: list[float | None], dtype: type[pl.DataType] = pl.Float32) -> pl.DataFrame:
    uids = [uid(number) for number in range(len(values))]
    return pl.DataFrame({"uid": uids, SCORE: pl.Series(values, dtype=dtype, strict=False)})


numbers = st.one_of(
    st.sampled_from([-0.2, -0.0, 0.0, 0.1, 0.25, 0.3, NAN, None, float("inf"), float("-inf")]),
    st.floats(-1, 1, width=32),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=30), st.floats(0.01, 1), st.data())
def test_top_fraction_is_datacomps(values: list[float | None], fraction: float, data: st.DataObject) -> None:
    one = ClipScore(top=fraction, model="b32")
    kept = assert_cuts_do_not_matter(one, scored(values), data)
    assert [verdict is True for verdict in kept] == numpy_keeps(values, fraction)
    assert [verdict is None for verdict in kept] == [value is None or np.isnan(value) for value in values]


def test_top_fraction_of_many_close_scores() -> None:
    """Neighbouring floats and long ties about the threshold: it is exact, not that of a histogram's bin."""
    draw = np.random.default_rng(0)
    values = np.float32(0.3) + draw.integers(-40, 40, 20_000).astype(np.float32) * np.spacing(np.float32(0.3))
    kept = ClipScore(top=0.4, model="b32").keep(pl.DataFrame({"uid": uid(0), SCORE: values}))
    assert kept.to_list() == numpy_keeps(values.tolist(), 0.4)


def test_what_parts_tell_each_other_is_little() -> None:
    draw = np.random.default_rng(0)
    rows = pl.DataFrame({"uid": uid(0), SCORE: draw.normal(0.2, 0.05, 200_000).astype(np.float32)})
    one = ClipScore(top=0.3, model="b32")
    first = one.partial(rows, [])
    state = one.merge([first.lazy()], [])
    assert first.height < 10_000
    assert state.height == 1
    assert one.partial(rows, [state]).height < 10_000


def test_where_too_few_have_a_score_nothing_stays() -> None:
    """As in DataComp's code: the value at the place is not a number, and nothing is at least that."""
    rows = scored([0.3, 0.2, NAN, None])
    assert ClipScore(top=0.5, model="b32").keep(rows).to_list() == [False, False, None, None]
    assert ClipScore(top=0.49, model="b32").keep(rows).to_list() == [True, True, None, None]


def test_fraction_one_keeps_all_that_have_a_score() -> None:
    rows = scored([0.1, NAN, None, -1.0])
    assert ClipScore(top=1.0, model="b32").keep(rows).to_list() == [True, None, None, True]


def test_threshold_is_inclusive_and_nan_is_unknown() -> None:
    rows = scored([0.25, 0.2, NAN, None])
    assert ClipScore(min=0.25, model="b32").keep(rows).to_list() == [True, False, None, None]


def test_threshold_is_held_against_scores_in_their_precision() -> None:
    """float32(0.29) is below 0.29; numpy compares both in single precision, where they are equal."""
    assert float(np.float32(0.29)) < 0.29
    one = ClipScore(min=0.29, model="b32")
    assert one.keep(scored([0.29])).to_list() == [True]
    assert one.keep(scored([float(np.float32(0.29))], pl.Float64)).to_list() == [False]


def test_scores_of_the_pools_own_json() -> None:
    rows = table({"json.similarity": "0.31"}, {"json.similarity": "0.1"}, {"json.similarity": "high"}, {})
    one = parse_filter({"clip_score": {"min": 0.3, "column": "json.similarity"}})
    assert one.columns() == {"json.similarity"}
    assert one.keep(rows).to_list() == [True, False, None, None]
    assert ClipScore(top=0.25, column="json.similarity").keep(rows).to_list() == [True, True, None, None]


def test_a_scorers_name() -> None:
    assert ClipScore(top=0.5, model="siglip_2").columns() == {"clip_siglip_2_similarity_score"}
    assert (ClipScore(top=0.5, model="a").scope, ClipScore(min=0.5, model="a").scope) == ("pool", "row")
    assert (ClipScore(top=0.5, model="a").num_rounds, ClipScore(min=0.5, model="a").num_rounds) == (2, 0)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"model": "b32"}, "either min or top"),
        ({"min": 0.1, "top": 0.5, "model": "b32"}, "either min or top"),
        ({"min": 0.1}, "either model, a scorer's name, or column"),
        ({"min": 0.1, "model": "b32", "column": "width"}, "either model, a scorer's name, or column"),
        ({"min": 0.1, "column": "caption"}, "caption is a String, not a number"),
    ],
)
def test_one_rule_at_a_time(parameters: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_filter({"clip_score": parameters})


def test_no_such_column() -> None:
    with pytest.raises(UnknownColumn, match="width"):
        parse_filter({"clip_score": {"min": 0.1, "column": "widht"}})
    with pytest.raises(UnknownColumn):
        parse_filter({"clip_score": {"min": 0.1, "model": "b 32"}})


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(0, 12)), max_size=20), st.integers(1, 25), st.booleans(), st.data())
def test_top_count(values: list[int | None], count: int, lowest: bool, data: st.DataObject) -> None:
    rows = table(*({"width": value} for value in values))
    kept = assert_cuts_do_not_matter(Top(column="width", count=count, lowest=lowest), rows, data)
    ranked = sorted((value for value in values if value is not None), reverse=not lowest)
    last = ranked[min(count, len(ranked)) - 1] if ranked else 0
    within = [None if value is None else (value <= last if lowest else value >= last) for value in values]
    assert kept == within


def test_top_fraction_of_a_column() -> None:
    rows = table(*({"width": value} for value in (5, 1, 4, 2)))
    assert Top(column="width", fraction=0.3).keep(rows).to_list() == [True, False, True, False]
    assert Top(column="width", fraction=0.3, lowest=True).keep(rows).to_list() == [False, True, False, True]
    with pytest.raises(ConfigError, match="either fraction or count"):
        parse_filter({"top": "width"})
