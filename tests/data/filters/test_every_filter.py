"""What holds for every registered filter."""

import polars as pl
import pytest

from mmfoundry.data.columns import COLUMNS
from mmfoundry.data.filters.base import FILTERS, Filter
from mmfoundry.data.filters.tree import parse_filter
from tests.data.filters.rows import table

# what a recipe writes where a filter needs a parameter
PARAMETERS = {
    "all": ["readable", {"min_side": 2}],
    "any": ["readable", {"min_side": 2}],
    "not": {"min_side": 2},
    "clip_score": {"top": 0.5},
    "expression": "width > 3",
}
READS_IDENTITY_ONLY = ("unique_uid", "readable", "all", "any")


def make(name: str) -> Filter:
    return parse_filter({name: PARAMETERS.get(name)})


def rows() -> pl.DataFrame:
    seen = {
        "caption": "a dog on a beach",
        "caption_words": 5,
        "caption_characters": 16,
        "language": "en",
        "language_probability": 0.9,
        "width": 300,
        "height": 200,
        "aspect": 1.5,
        "sha256": b"a" * 32,
        "perceptual_hash": bytes(64),
        "pixel_deviation": 30.0,
        "clip_score": 0.3,
    }
    other = {"sha256": b"b" * 32, "perceptual_hash": b"\xff" * 64, "clip_score": 0.1, "width": 1}
    return table(seen, seen | other, {"unreadable": "damaged image"})


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_a_verdict_a_row(name: str) -> None:
    one = make(name)
    before = rows()
    verdict = one.keep(before)
    assert (verdict.dtype, len(verdict)) == (pl.Boolean, 3)
    assert before.equals(rows()), "a filter changed its table"
    assert one.columns() <= set(COLUMNS)
    assert one.scope in ("row", "pool")
    assert verdict.equals(one.keep(before.select("uid", *one.columns() - {"uid"}))), "reads more than it declares"


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_an_empty_table(name: str) -> None:
    assert make(name).keep(rows().clear()).to_list() == []


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_nulls_cannot_be_judged(name: str) -> None:
    """A row with nothing known but its place is kept by no filter on what is unknown, turned around or not."""
    if name in READS_IDENTITY_ONLY:
        pytest.skip("reads what is always known")
    unknown = table({}, {})
    assert make(name).keep(unknown).to_list() == [None, None]
    assert parse_filter({"not": {name: PARAMETERS.get(name)}}).keep(unknown).to_list() == [None, None]


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_row_filters_judge_each_row_by_itself(name: str) -> None:
    one = make(name)
    if one.scope == "pool":
        pytest.skip("compares rows")
    apart = [one.keep(rows()[[row]])[0] for row in range(3)]
    assert apart == one.keep(rows()).to_list()


def test_every_filter_says_what_it_is_for() -> None:
    assert {"all", "any", "not", "basic", "exact_duplicate", "near_duplicate", "expression"} <= set(FILTERS)
    for row in FILTERS.describe():
        assert row.summary.endswith((".", ":")) or len(row.summary) > 20, row
        for field, info in FILTERS[row.name].model_fields.items():
            assert info.description, f"{row.name}.{field}"
