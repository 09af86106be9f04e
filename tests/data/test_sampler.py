"""The order: the same for ever and for any ranks, each sample once an epoch, exact shares, budgets and repeats."""

import hashlib
import math
import tracemalloc
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfoundry.data.inspect import iter_keys
from mmfoundry.data.permutation import RUN
from mmfoundry.data.reader import Pool
from mmfoundry.data.sampler import Order, Seen, rank_positions, sample_rng
from mmfoundry.data.shards import write_shard
from mmfoundry.pipeline.errors import ConfigError

GOLDEN_MIXTURE = [(1, 0, 3), (0, 0, 0), (0, 0, 2), (0, 0, 5), (0, 0, 3), (1, 0, 4)]


def digest(order: Order, positions: int) -> str:
    """Of all draws up to a position, and of some replacements."""
    draws = [*map(order.at, range(positions)), *(order.redraw(p, 1) for p in range(0, positions, 97))]
    text = "".join(f"{draw.source} {draw.epoch} {draw.index}\n" for draw in draws)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_order_is_fixed_for_good() -> None:
    """A change here breaks the resume of every run that was saved before it."""
    order = Order([7, 5], [2, 1], seed=3)
    assert [(d.source, d.epoch, d.index) for d in map(order.at, range(6))] == GOLDEN_MIXTURE
    # taken before there were block shuffles: what fits in one window keeps its order
    assert digest(Order([612, 3060, 6000], [1, 1, 2], seed=0), 30_000) == "ad0bba5403363795"
    assert digest(Order([6000], [1.0], seed=5), 15_000) == "39f1ed6eefc849e4"
    assert digest(Order([65_536], [1.0], seed=1), 20_000) == "0d39351df13f8f9c"
    # taken when they came
    assert digest(Order([100_003, 65_537], upsampling=[1, 2], seed=4), 3000) == "70d86ba40f583037"


@pytest.mark.parametrize(("size", "window"), [(50, 1 << 16), (3000, 512), (2 * RUN + 1, RUN)])
def test_epochs_have_orders_of_their_own_and_each_sample_once(size: int, window: int) -> None:
    order = Order([size], seed=1, window=window)
    epochs = [[order.at(epoch * size + place) for place in range(size)] for epoch in range(3)]
    assert all(sorted(draw.index for draw in epoch) == list(range(size)) for epoch in epochs)
    assert [{draw.epoch for draw in epoch} for epoch in epochs] == [{0}, {1}, {2}]
    assert len({tuple(draw.index for draw in epoch) for epoch in epochs}) == 3
    other = Order([size], seed=2, window=window)
    assert [other.at(place).index for place in range(size)] != [draw.index for draw in epochs[0]]


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


@settings(max_examples=25, deadline=None)
@given(
    sources=st.lists(st.tuples(st.integers(1, 1500), st.integers(1, 3)), min_size=1, max_size=3),
    window=st.integers(RUN, 1000),
    seed=st.integers(0, 2**64 - 1),
)
def test_upsampling_repeats_every_sample_that_often_an_epoch(
    sources: list[tuple[int, int]], window: int, seed: int
) -> None:
    sizes, factors = zip(*sources, strict=True)
    order = Order(sizes, upsampling=factors, seed=seed, window=window)
    epoch = order.epoch_samples
    assert epoch == sum(size * factor for size, factor in sources)
    for start in (0, epoch):
        drawn = Counter((d.source, d.index) for d in map(order.at, range(start, start + epoch)))
        assert drawn == {(s, i): factor for s, (size, factor) in enumerate(sources) for i in range(size)}


def test_half_a_pass_takes_the_other_half_in_the_next_epoch() -> None:
    order = Order([100, 300], upsampling=[0.5, 1], seed=1)
    assert (order.epoch_samples, list(order.counts)) == (350, [50, 300])
    halves = [
        {d.index for d in map(order.at, range(epoch * 350, (epoch + 1) * 350)) if d.source == 0} for epoch in (0, 1)
    ]
    assert [len(half) for half in halves] == [50, 50]
    assert halves[0] | halves[1] == set(range(100))
    assert list(Order([30, 10]).counts) == [30, 10]  # by default each sample comes once


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 900), min_size=1, max_size=3),
    weighted=st.booleans(),
    position=st.integers(0, 5000),
    seed=st.integers(0, 2**32),
)
def test_repeats_are_counted_exactly(sizes: list[int], weighted: bool, position: int, seed: int) -> None:
    factors = [2.0, 1.0, 0.7][: len(sizes)]
    order = Order(sizes, factors if weighted else None, seed, upsampling=None if weighted else [2, 1, 3][: len(sizes)])
    drawn = Counter((d.source, d.index) for d in map(order.at, range(position)))
    for source, (seen, size) in enumerate(zip(order.seen(position), sizes, strict=True)):
        times = [drawn[source, index] for index in range(size)]
        assert (seen.drawn, seen.samples) == (sum(times), size)
        assert (seen.unique, seen.repeats) == (sum(map(bool, times)), sum(max(0, time - 1) for time in times))
        assert sorted(set(times)) == sorted({seen.drawn // size, -(-seen.drawn // size)})


def test_a_budget_is_in_samples_or_in_epochs() -> None:
    order = Order([100, 50], upsampling=[1, 3])
    assert (order.budget(), order.budget(samples=1234), order.budget(epochs=2)) == (None, 1234, 500)
    assert order.budget(epochs=0.5) == 125
    assert Order([70], [2.5]).budget(epochs=3) == 210  # the weight of a single source says nothing
    assert order.seen(500) == [Seen(200, 100), Seen(300, 50)]
    with pytest.raises(ConfigError, match="no common epoch"):
        Order([5, 5], [1, 1]).budget(epochs=1)
    with pytest.raises(ConfigError, match="not both"):
        order.budget(epochs=1, samples=1)
    for nothing in ({"epochs": 0.0}, {"samples": 0}, {"samples": -5}, {"epochs": -1.0}):
        with pytest.raises(ConfigError, match="budget"):
            order.budget(**nothing)


def test_mixtures_that_cannot_be_meant_are_refused() -> None:
    for options, named in (
        ({"weights": [1, 1], "upsampling": [1, 1]}, "not both"),
        ({"upsampling": [1]}, "as many upsampling"),
        ({"upsampling": [1, math.inf]}, "above 0"),
        ({"upsampling": [1, 0.01]}, "no sample of its 5"),
        ({"weights": [1.0, 0.0]}, "weight"),
        ({"window": RUN - 1}, "window is 255; it needs at least 256"),
    ):
        with pytest.raises(ConfigError, match=named):
            Order([5, 5], **options)
    for sizes in ([], [3, 0]):
        with pytest.raises(ConfigError, match="sources with samples"):
            Order(sizes)


@given(
    start=st.integers(0, 10**12),
    each=st.integers(1, 50),
    world=st.integers(1, 16),
    short=st.integers(0, 900),
)
def test_ranks_share_a_step_exactly(start: int, each: int, world: int, short: int) -> None:
    parts = [rank_positions(start, each * world, rank, world) for rank in range(world)]
    assert sorted(position for part in parts for position in part) == list(range(start, start + each * world))
    assert {len(part) for part in parts} == {each}
    assert [part[0] for part in parts] == list(range(start, start + world))
    short = min(short, each * world)
    cut = [rank_positions(start, each * world, rank, world, end=start + short) for rank in range(world)]
    assert sorted(position for part in cut for position in part) == list(range(start, start + short))
    assert max(map(len, cut)) - min(map(len, cut)) <= 1


@settings(max_examples=30, deadline=None)
@given(
    worlds=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 40), st.integers(0, 9)), min_size=2, max_size=4),
    sizes=st.lists(st.integers(1, 2000), min_size=1, max_size=3),
    window=st.integers(RUN, 3000),
    seed=st.integers(0, 2**64 - 1),
)
def test_ranks_and_batches_may_change_anywhere(
    worlds: list[tuple[int, int, int]], sizes: list[int], window: int, seed: int
) -> None:
    """A run that is cut off and goes on with other ranks and batches draws what an uninterrupted one draws."""
    whole, resumed = Order(sizes, seed=seed, window=window), []
    position = 0
    for world, each, steps in worlds:
        order = ForkingPickler.loads(
            ForkingPickler.dumps(Order(sizes, seed=seed, window=window))
        )  # as in a worker of its own
        for _ in range(steps):
            parts = [rank_positions(position, each * world, rank, world) for rank in range(world)]
            draws = [[order.at(p) for p in part] for part in parts]
            resumed += [draws[place % world][place // world] for place in range(each * world)]
            position += each * world
    assert resumed == [whole.at(p) for p in range(position)]


def test_shards_of_unequal_sizes_are_read_once_an_epoch(tmp_path: Path) -> None:
    """Runs lie across the borders of shards, so their sizes do not matter to the order."""
    for number, size in enumerate((1, 300, 17, 520, 64, 2)):
        write_shard(tmp_path / f"{number}.tar", ({"__key__": f"{number}-{i}", "txt": "a"} for i in range(size)))
    pool = Pool(tmp_path)
    assert Order([len(pool)], window=RUN).windows == [4]
    epochs = [list(iter_keys(pool, seed=7, epoch=epoch, window=RUN)) for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(pool.key(number) for number in range(904))


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


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    """Draws all over the order, so that whatever is kept per window, epoch or run has every chance to pile up."""
    peaks = []
    for size in (10**6, 10**12):
        tracemalloc.start()
        order = Order([size, 10 * size], upsampling=[3, 1])
        for position in range(0, 10 * size, size):  # each in another window and epoch
            order.at(position)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # what is kept of recent windows and blocks, which are alike at both sizes
    assert max(peaks) < 16 << 20
    assert peaks[1] < 2 * peaks[0]
