"""The order: permutations, exact mixtures, mixing, and an exact share-out over ranks."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfoundry.data.sampler import Order, mix, permute, rank_positions, sample_rng
from mmfoundry.pipeline.errors import ConfigError

GOLDEN_SMALL = [8, 9, 5, 0, 2, 3, 7, 4, 1, 6]
GOLDEN_LARGE = [988790364, 512186925, 111651523, 349155174]
GOLDEN_MIXTURE = [(1, 0, 3), (0, 0, 0), (0, 0, 2), (0, 0, 5), (0, 0, 3), (1, 0, 4)]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000, 4096, 4097, 5000, 16384, 30_000])
def test_permute_is_a_permutation(size: int) -> None:
    assert sorted(permute(position, size, seed=11) for position in range(size)) == list(range(size))


@given(size=st.integers(1, 10**15), position=st.integers(0, 10**15), seed=st.integers(0, 2**64 - 1))
def test_permute_stays_in_range_at_any_size(size: int, position: int, seed: int) -> None:
    assert 0 <= permute(position % size, size, seed) < size


def test_the_order_is_fixed_for_good() -> None:
    """A change here breaks the resume of every run that was saved before it."""
    assert [permute(p, 10, 1) for p in range(10)] == GOLDEN_SMALL
    assert [permute(p, 10**9, 1) for p in range(4)] == GOLDEN_LARGE
    order = Order([7, 5], [2, 1], seed=3)
    assert [(d.source, d.epoch, d.index) for d in map(order.at, range(6))] == GOLDEN_MIXTURE


@pytest.mark.parametrize("size", [1000, 50_000])
def test_mixing_is_that_of_a_random_permutation(size: int) -> None:
    """Displacement, neighbours and positions of a full shuffle, by statistics with known mean and spread."""
    for seed in range(5):
        found = np.array([permute(position, size, mix(seed)) for position in range(size)])
        place = np.arange(size)
        # correlation of place and value: standard deviation 1 / sqrt(size - 1)
        assert abs(np.corrcoef(place, found)[0, 1]) < 4.5 / math.sqrt(size)
        assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 4.5 / math.sqrt(size)
        # neighbours that stay neighbours: Poisson with mean 2
        assert (abs(np.diff(found)) == 1).sum() < 12
        # where each tenth of the values goes, over tenths of the places: chi-square with 81 degrees of freedom
        table = np.histogram2d(place, found, bins=10)[0]
        chi_square = ((table - size / 100) ** 2 / (size / 100)).sum()
        assert chi_square < 81 + 5 * math.sqrt(2 * 81)


def test_epochs_have_orders_of_their_own_and_each_sample_once() -> None:
    order = Order([50], seed=1)
    epochs = [[order.at(epoch * 50 + place) for place in range(50)] for epoch in range(3)]
    assert all(sorted(draw.index for draw in epoch) == list(range(50)) for epoch in epochs)
    assert [{draw.epoch for draw in epoch} for epoch in epochs] == [{0}, {1}, {2}]
    assert len({tuple(draw.index for draw in epoch) for epoch in epochs}) == 3
    assert [Order([50], seed=2).at(place).index for place in range(50)] != [draw.index for draw in epochs[0]]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 20), min_size=4, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_weights_are_exact_in_every_block_and_sources_go_round(sizes: list[int], weights: list[int], seed: int) -> None:
    weights = weights[: len(sizes)]
    order = Order(sizes, weights, seed)
    blocks = 3
    draws = [order.at(position) for position in range(blocks * order.block)]
    for block in range(blocks):
        part = draws[block * order.block : (block + 1) * order.block]
        for source, weight in enumerate(weights):
            assert sum(draw.source == source for draw in part) * sum(weights) == weight * order.block
    for source, size in enumerate(sizes):
        mine = [(draw.epoch, draw.index) for draw in draws if draw.source == source]
        for start in range(0, len(mine) - size + 1, size):
            assert sorted(mine[start : start + size]) == [(start // size, index) for index in range(size)]


def test_odd_weights_are_met_within_a_block() -> None:
    order = Order([10, 10, 10], [math.pi, math.e, 0.01])
    share = np.array(order.counts) / order.block
    np.testing.assert_allclose(share, np.array([math.pi, math.e, 0.01]) / (math.pi + math.e + 0.01), atol=1 / 4096)
    assert Order([30, 10]).counts == [192, 64]  # without weights, each sample counts alike


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, 1e-9], [1.0]])
def test_weights_that_cannot_be_met_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="weight"):
        Order([5, 5], weights)


@given(start=st.integers(0, 10**12), each=st.integers(1, 50), world=st.integers(1, 16))
def test_ranks_share_a_step_exactly(start: int, each: int, world: int) -> None:
    parts = [rank_positions(start, each * world, rank, world) for rank in range(world)]
    assert sorted(position for part in parts for position in part) == list(range(start, start + each * world))
    assert {len(part) for part in parts} == {each}
    assert [part[0] for part in parts] == list(range(start, start + world))


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ConfigError, match="10 samples cannot be shared evenly by 4 ranks"):
        rank_positions(0, 10, 0, 4)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        rank_positions(0, 10, 2, 2)


def test_a_place_is_refilled_from_its_own_source() -> None:
    order = Order([40, 60], [1, 1], seed=5)
    for position in range(100):
        draws = [order.redraw(position, attempt) for attempt in range(1, 5)]
        assert {draw.source for draw in draws} == {order.at(position).source}
        assert len({draw.index for draw in draws}) > 1
        assert draws == [order.redraw(position, attempt) for attempt in range(1, 5)]


def test_every_position_has_a_generator_of_its_own() -> None:
    first = [sample_rng(seed, position).integers(2**62) for seed in (0, 1, 2**40) for position in range(50)]
    assert len(set(first)) == 150
    assert sample_rng(1, 7).random() == sample_rng(1, 7).random()


def test_a_billion_samples_need_no_memory() -> None:
    import tracemalloc

    tracemalloc.start()
    order = Order([10**9, 10**10], [3, 1])
    for position in range(0, 10**12, 10**10):
        order.at(position)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20
