"""data/filters/tree.py: what a recipe may write, and what it is told when it may not."""

from typing import Any

import pytest

from mmfoundry.data.filters.base import name_of
from mmfoundry.data.filters.basic import Basic, MinSide
from mmfoundry.data.filters.tree import parse_filter
from mmfoundry.pipeline.errors import ConfigError, UnknownColumn, UnknownName


def test_the_ways_to_write_a_filter() -> None:
    same = [parse_filter(tree) for tree in ({"min_side": {"pixels": 200}}, {"min_side": 200}, {"min_side": None})]
    assert same == [MinSide()] * 3
    assert parse_filter("basic") == parse_filter({"basic": {}}) == Basic()
    tree = parse_filter({"all": ["readable", {"any": [{"not": {"language": {"languages": ["en"]}}}, "not_blank"]}]})
    assert [name for name, _ in tree.parts()] == ["readable", "any"]
    assert name_of(tree) == "all"


def test_a_tree_comes_back_as_it_was_dumped() -> None:
    one = parse_filter({"basic": {"min_side": 64}})
    assert parse_filter({"basic": one.model_dump(mode="json")}) == one


@pytest.mark.parametrize(
    ("tree", "kind", "says"),
    [
        ({"all": [{"basic": {"min_sidee": 3}}]}, ConfigError, "all.0.basic.min_sidee .* did you mean min_side?"),
        ({"all": ["readable", {"any": ["basicc"]}]}, UnknownName, "all.1.any.0.basicc .* did you mean basic?"),
        ({"qqq": {}}, UnknownName, "qqq is not a known filter; known: all, any, basic"),
        ({"basic": {"max_aspect": "wide"}}, ConfigError, "basic.max_aspect: .*number.* not 'wide'"),
        ({"basic": {"max_aspect": 0.5}}, ConfigError, "basic.max_aspect: .*greater than or equal to 1"),
        ({"expression": None}, ConfigError, "expression.formula is missing"),
        ({"not": {"expression": "widht > 3"}}, UnknownColumn, "not.expression.formula: .*did you mean width"),
        ({"readable": 3}, ConfigError, "readable takes no parameters"),
        ({"all": []}, ConfigError, "all: give a list"),
        ({"all": {"basic": {}}}, ConfigError, "all: give a list"),
        ({"basic": {}, "readable": {}}, ConfigError, r"one filter .* not 2 names \(basic, readable\)"),
        ({}, ConfigError, "one filter is a name"),
        ([], ConfigError, "one filter is a name"),
        ({3: {}}, ConfigError, "one filter is a name"),
        ({"not": None}, ConfigError, "not: one filter is a name"),
        ({"near_duplicate": 900}, ConfigError, "near_duplicate.radius"),
        ({"min_side": float("nan")}, ConfigError, "min_side.pixels"),
    ],
)
def test_errors_name_the_place(tree: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        parse_filter(tree)
    assert "\n" not in str(caught.value)


def test_a_bottomless_tree_is_refused() -> None:
    tree: Any = "readable"
    for _ in range(500):
        tree = {"not": tree}
    with pytest.raises(ConfigError, match="nested"):
        parse_filter(tree)
