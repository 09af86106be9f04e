"""Soups: means of weights, and which models are let in."""

from functools import partial

import pytest
import torch

from mmfoundry.pipeline.soups import greedy, uniform


def state(value: float, count: int = 0) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2,), value), "half": torch.full((1,), value).half(), "count": torch.tensor(count)}


def test_uniform_is_the_mean_in_the_same_types() -> None:
    soup = uniform([state(1.0, 3), state(2.0, 4), state(6.0, 5)])
    assert {name: value.tolist() for name, value in soup.items()} == {"w": [3.0, 3.0], "half": [3.0], "count": 5}
    assert soup["half"].dtype == torch.float16


def test_greedy_takes_what_does_not_hurt_best_first() -> None:
    values = [5.0, 1.0, -0.9, 0.2]  # the nearer to 0, the better
    soup = greedy([partial(state, value) for value in values], lambda each: -float(each["w"][0].abs()))
    # 0.2 alone; with -0.9: -0.35, worse; with 1.0: 0.6, worse
    assert soup.members == [3]
    assert soup.scores == pytest.approx([-5.0, -1.0, -0.9, -0.2])
    values = [1.0, -0.8, 3.0, -0.7]
    soup = greedy([partial(state, value) for value in values], lambda each: -float(each["w"][0].abs()))
    # -0.7; -0.75 with the next is worse; 0.15 with 1.0 is better; 1.1 with 3.0 is worse
    assert soup.members == [3, 0]
    assert float(soup.state["w"][0]) == pytest.approx(0.15)
    assert soup.score == pytest.approx(-0.15)


def test_only_alike_models_mix() -> None:
    for mix in (uniform, lambda states: greedy([partial(dict, each) for each in states], lambda each: 0.0)):
        with pytest.raises(ValueError, match="same weights"):
            mix([{"w": torch.zeros(2)}, {"w": torch.zeros(3)}])
        with pytest.raises(ValueError, match="at least one"):
            mix([])
