"""data/filters/combine.py: the algebra of filters, in its three values, and what a sequence means."""

from typing import Any

import polars as pl
import pytest

from mmfoundry.data.filters.tree import parse_filter
from tests.data.filters.rows import table, uid

WIDE, TALL = {"expression": "width > 10"}, {"expression": "height > 10"}
# width decides the first filter, height the second; null: cannot be judged
VALUES: dict[bool | None, int | None] = {True: 20, False: 5, None: None}
PAIRS = [(a, b) for a in VALUES for b in VALUES]


def verdicts(tree: Any) -> list[bool | None]:
    rows = [{"width": VALUES[a], "height": VALUES[b]} for a, b in PAIRS]
    return parse_filter(tree).keep(table(*rows)).to_list()


def test_all_is_the_first_that_does_not_keep() -> None:
    assert verdicts({"all": [WIDE, TALL]}) == [b if a is True else a for a, b in PAIRS]


def test_any_needs_one() -> None:
    expected = [True if True in pair else (None if None in pair else False) for pair in PAIRS]
    assert verdicts({"any": [WIDE, TALL]}) == expected


def test_not_turns_around_what_is_known() -> None:
    assert verdicts({"not": WIDE}) == [None if a is None else not a for a, _ in PAIRS]


def test_de_morgan_where_all_is_known() -> None:
    left = verdicts({"not": {"all": [WIDE, TALL]}})
    right = verdicts({"any": [{"not": WIDE}, {"not": TALL}]})
    known = [None not in pair for pair in PAIRS]
    assert [v for v, k in zip(left, known, strict=True) if k] == [v for v, k in zip(right, known, strict=True) if k]


def test_a_later_filter_sees_only_what_is_left() -> None:
    """The copy with the smaller uid is in the wrong language; the other copy must stay."""
    same = {"sha256": b"x" * 32}
    rows = table({"uid": uid(1), "language": "fr", **same}, {"uid": uid(2), "language": "en", **same})
    assert parse_filter({"all": ["language", "exact_duplicate"]}).keep(rows).to_list() == [False, True]
    # among all rows the first one is the one that stays, so nothing is left after the language
    assert parse_filter({"all": ["exact_duplicate", "language"]}).keep(rows).to_list() == [False, False]


def test_columns_and_scope_are_those_of_the_children() -> None:
    tree = parse_filter({"any": [{"not": WIDE}, {"all": [TALL, "exact_duplicate"]}]})
    assert tree.columns() == {"width", "height", "sha256"}
    assert tree.scope == "pool"
    assert parse_filter({"any": [WIDE, TALL]}).scope == "row"


@pytest.mark.parametrize("kind", ["all", "any"])
def test_one_child_is_that_child(kind: str) -> None:
    assert verdicts({kind: [WIDE]}) == [a for a, _ in PAIRS]
    assert isinstance(parse_filter({kind: [WIDE]}).keep(table({})), pl.Series)
