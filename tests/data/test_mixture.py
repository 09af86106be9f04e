"""Mixtures: exact shares in every block or epoch, and exact counts of what was drawn before any position."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfoundry.data.mixture import ByPasses, ByWeight, Mixture
from mmfoundry.pipeline.errors import ConfigError

GOLDEN_PASSES = [(2, 249), (1, 1249), (1, 1250), (0, 1500), (2, 250), (1, 1251)]


def test_the_shares_of_passes_are_fixed_for_good() -> None:
    """A change here breaks the resume of every run that was saved before it. Weights: see test_sampler."""
    mixture = ByPasses([3000, 2500, 500], seed=3)
    assert [mixture.at(position) for position in range(2998, 3004)] == GOLDEN_PASSES


@settings(max_examples=12, deadline=None)
@given(counts=st.lists(st.integers(1, 3000), min_size=1, max_size=4), seed=st.integers(0, 2**64 - 1))
def test_passes_are_exact_in_every_epoch_and_even_inside(counts: list[int], seed: int) -> None:
    mixture = ByPasses(counts, seed)
    total = sum(counts)
    assert mixture.block == total
    used = [0] * len(counts)
    parts = -(-total // 4096)
    for position in range(2 * total):
        source, within = mixture.at(position)
        assert within == used[source]  # none left out, none twice
        used[source] += 1
        # never further from the even share than a part of the epoch holds
        share = counts[source] * (position + 1) / total
        assert abs(used[source] - share) <= counts[source] / parts + len(counts) + 1
        if (position + 1) % total == 0:
            assert used == [(position + 1) // total * count for count in counts]


def mixtures() -> list[Mixture]:
    return [ByWeight([3.0, 1.0, 2.0], 3, seed=5), ByWeight([math.pi, 1.0], 2, seed=5), ByPasses([900, 7777, 20], 5)]


@pytest.mark.parametrize("mixture", mixtures(), ids=["weights", "odd weights", "passes"])
def test_what_was_drawn_is_counted_without_walking(mixture: Mixture) -> None:
    used = [0] * len(mixture.counts)
    for position in range(2 * mixture.block + 100):
        if position % 61 == 0 or position % mixture.block in (0, 1):
            assert mixture.drawn(position) == used
        used[mixture.at(position)[0]] += 1
    far = 10**15 * mixture.block
    assert mixture.drawn(far) == [10**15 * count for count in mixture.counts]


def test_odd_weights_are_met_within_a_block() -> None:
    mixture = ByWeight([math.pi, math.e, 0.01], 3, seed=0)
    share = np.array(mixture.counts) / mixture.block
    np.testing.assert_allclose(share, np.array([math.pi, math.e, 0.01]) / (math.pi + math.e + 0.01), atol=1 / 4096)


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, 1e-9], [1.0]])
def test_weights_that_cannot_be_met_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="weight"):
        ByWeight(weights, 2, seed=0)
