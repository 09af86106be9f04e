"""data/filters/score.py against DataComp's rule for a top fraction."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfoundry.data.filters.score import ClipScore
from mmfoundry.data.filters.tree import parse_filter
from mmfoundry.pipeline.errors import ConfigError
from tests.data.filters.rows import table


def datacomp_keeps(scores: list[float], fraction: float) -> list[bool]:
    """The threshold is the score at place int(n f) of those sorted from the highest; ties are kept."""
    values = np.array(scores, np.float32)
    threshold = -np.sort(-values)[int(len(values) * fraction)]
    return (values >= threshold).tolist()


scores = st.lists(st.sampled_from([-0.2, 0.0, 0.1, 0.1, 0.25, 0.3, 0.31]), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(scores, st.floats(0.01, 0.99))
def test_top_fraction_is_datacomps(values: list[float], fraction: float) -> None:
    rows = table(*({"clip_score": value} for value in values))
    assert ClipScore(top=fraction).keep(rows).to_list() == datacomp_keeps(values, fraction)


def test_fraction_one_keeps_all_that_have_a_score() -> None:
    rows = table({"clip_score": 0.1}, {"clip_score": float("nan")}, {}, {"clip_score": -1.0})
    assert ClipScore(top=1.0).keep(rows).to_list() == [True, None, None, True]


def test_threshold_is_inclusive_and_nan_is_unknown() -> None:
    rows = table({"clip_score": 0.25}, {"clip_score": 0.2}, {"clip_score": float("nan")}, {})
    assert ClipScore(min=0.25).keep(rows).to_list() == [True, False, None, None]


def test_scores_of_the_pools_own_json() -> None:
    rows = table({"json.similarity": "0.31"}, {"json.similarity": "0.1"}, {"json.similarity": "high"}, {})
    one = parse_filter({"clip_score": {"min": 0.3, "column": "json.similarity"}})
    assert one.columns() == {"json.similarity"}
    assert one.keep(rows).to_list() == [True, False, None, None]


@pytest.mark.parametrize("parameters", [{}, {"min": 0.1, "top": 0.5}])
def test_one_rule_at_a_time(parameters: dict) -> None:
    with pytest.raises(ConfigError, match="either min or top"):
        parse_filter({"clip_score": parameters})
