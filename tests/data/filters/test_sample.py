"""data/filters/sample.py: draws that belong to uids."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfoundry.data.filters.sample import CapPerCluster, Drawn, draws_of
from mmfoundry.data.filters.tree import parse_filter
from mmfoundry.pipeline.errors import ConfigError, UnknownColumn
from tests.data.filters.cutting import assert_cuts_do_not_matter
from tests.data.filters.rows import table, uid


def pool(count: int, **columns: object) -> pl.DataFrame:
    return pl.DataFrame({"uid": [uid(number) for number in range(count)], **columns})


def test_a_fraction_is_about_that_many_and_independent_of_other_seeds() -> None:
    rows = pool(20_000)
    kept = [Drawn(fraction=0.3, seed=seed).keep(rows).to_numpy() for seed in (0, 1)]
    for one in kept:
        assert abs(one.mean() - 0.3) < 0.015  # 4.6 standard deviations
    assert abs((kept[0] & kept[1]).mean() - 0.09) < 0.01
    assert Drawn(fraction=0.0).keep(rows).sum() == 0
    assert Drawn(fraction=1.0).keep(rows).sum() == rows.height
    smaller = Drawn(fraction=0.1).keep(rows)
    assert (smaller & ~Drawn(fraction=0.3).keep(rows)).sum() == 0, "a smaller sample is part of a larger one"


def test_the_draw_is_the_same_everywhere() -> None:
    """Written down: another number here would draw other samples in everybody's pools."""
    draws = draws_of(pl.Series(["0" * 32, "0123456789abcdef" * 2]), seed=0)
    assert [int(draw) for draw in draws] == [2558736989570252433, 11853084857015020503]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 15), max_size=25), st.integers(1, 20), st.integers(0, 3), st.data())
def test_a_count(numbers: list[int], count: int, seed: int, data: st.DataObject) -> None:
    """So many samples, however many captions they have, in whatever parts they come."""
    rows = pl.DataFrame({"uid": pl.Series([uid(number) for number in numbers], dtype=pl.String)})
    kept = assert_cuts_do_not_matter(Drawn(count=count, seed=seed), rows, data)
    chosen = {number for number, verdict in zip(numbers, kept, strict=True) if verdict}
    assert len(chosen) == min(count, len(set(numbers)))
    assert kept == [number in chosen for number in numbers]


@pytest.mark.parametrize("parameters", [{}, {"fraction": 0.5, "count": 3}])
def test_one_rule_at_a_time(parameters: dict) -> None:
    with pytest.raises(ConfigError, match="either fraction or count"):
        parse_filter({"sample": parameters})


pairs = st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["en", "de", None])), max_size=30)


@settings(max_examples=30, deadline=None)
@given(pairs, st.integers(1, 4), st.data())
def test_cap(pairs: list[tuple[int, str | None]], count: int, data: st.DataObject) -> None:
    rows = table(*({"uid": uid(number), "language": language} for number, language in pairs))
    kept = assert_cuts_do_not_matter(CapPerCluster(column="language", count=count), rows, data)
    for language in ("en", "de"):
        members = {number for number, own in pairs if own == language}
        stay = {number for (number, own), verdict in zip(pairs, kept, strict=True) if own == language and verdict}
        assert len(stay) == min(count, len(members))
        draws = dict(zip(members, draws_of(pl.Series([uid(one) for one in members], dtype=pl.String), 0), strict=True))
        assert stay == set(sorted(members, key=draws.__getitem__)[:count])
    assert [verdict is None for verdict in kept] == [language is None for _, language in pairs]


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_cap_of_clusters_of_embeddings(data: st.DataObject) -> None:
    draw = np.random.default_rng(1)
    centres = np.eye(4)[[0] * 20 + [1] * 10 + [2] * 3]
    points = (centres + draw.normal(0, 0.02, centres.shape)).astype(np.float32).tolist()
    rows = pool(34, vit_img=pl.Series([*points, None], dtype=pl.List(pl.Float32)))
    one = CapPerCluster(column="vit_img", count=5, num_clusters=3)
    kept = assert_cuts_do_not_matter(one, rows, data)
    assert [sum(map(bool, kept[a:b])) for a, b in ((0, 20), (20, 30), (30, 33))] == [5, 5, 3]
    assert kept[33] is None


def test_what_makes_no_clusters() -> None:
    with pytest.raises(UnknownColumn):
        parse_filter({"cap_per_cluster": {"column": "langauge", "count": 1}})
    with pytest.raises(ConfigError, match="face_bboxes is a List"):
        parse_filter({"cap_per_cluster": {"column": "face_bboxes", "count": 1}})
