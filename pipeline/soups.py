"""Model soups: one model whose weights are the mean of several models' (Wortsman et al. 2022, arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

State = Mapping[str, Tensor]


class Soup(NamedTuple):
    """A greedy soup.

    Attributes:
        state: the mean weights.
        members: which of the candidates are in it, in the order in which they were taken.
        score: of the soup.
        scores: of each candidate alone, in the order given.
    """

    state: dict[str, Tensor]
    members: list[int]
    score: float
    scores: list[float]


def uniform(states: Sequence[State]) -> dict[str, Tensor]:
    """The mean of all; sums in fp64, each tensor in the type that it came in. Whole numbers are the last one's.

    Raises:
        ValueError: there is none, or names or shapes differ.
    """
    if not states:
        raise ValueError("a soup needs at least one model")
    first = {name: value.shape for name, value in states[0].items()}
    for state in states[1:]:
        if {name: value.shape for name, value in state.items()} != first:
            raise ValueError("the models of a soup must have the same weights: names or shapes differ")
    return {name: _mean([state[name] for state in states]) for name in first}


def greedy(candidates: Sequence[Callable[[], State]], score: Callable[[State], float]) -> Soup:
    """Take the best, then each of the others, best first, if the soup does not score lower with it.

    Args:
        candidates: each gives a model's weights when it is called, so that only those at hand take memory.
        score: of weights on data that nothing was trained on; higher is better.

    Raises:
        ValueError: there is no candidate.
    """
    if not candidates:
        raise ValueError("a soup needs at least one model")
    scores = [score(load()) for load in candidates]
    order = sorted(range(len(candidates)), key=lambda index: -scores[index])  # stable: of equals the first
    members, best, state = [order[0]], scores[order[0]], dict(candidates[order[0]]())
    for index in order[1:]:
        tried = _with_one_more(state, len(members), candidates[index]())
        reached = score(tried)
        if reached >= best:
            members, best, state = [*members, index], reached, tried
    return Soup(state, members, best, scores)


def _with_one_more(mean: State, count: int, state: State) -> dict[str, Tensor]:
    if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in mean.items()}:
        raise ValueError("the models of a soup must have the same weights: names or shapes differ")
    return {
        name: mean[name] + (value - mean[name]) / (count + 1) if value.is_floating_point() else value
        for name, value in state.items()
    }


def _mean(values: list[Tensor]) -> Tensor:
    if not values[0].is_floating_point():
        return values[-1]
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for value in values:
        total += value
    return (total / len(values)).to(values[0].dtype)
