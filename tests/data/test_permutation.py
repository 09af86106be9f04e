"""Permutations: exact at any size, fixed for good, mixing as they should, and local where they are block shuffles."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfoundry.data.permutation import RUN, block_permute, mix, permute, windows_of

GOLDEN_SMALL = [8, 9, 5, 0, 2, 3, 7, 4, 1, 6]
GOLDEN_LARGE = [988790364, 512186925, 111651523, 349155174]
GOLDEN_BLOCKS = [477729459, 319724218, 536123110, 735691865]
SEEDS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000, 4096, 4097, 5000, 16384, 30_000])
def test_permute_is_a_permutation(size: int) -> None:
    assert sorted(permute(position, size, seed=11) for position in range(size)) == list(range(size))


@given(size=st.integers(1, 10**15), position=st.integers(0, 10**15), seed=SEEDS)
def test_permute_stays_in_range_at_any_size(size: int, position: int, seed: int) -> None:
    assert 0 <= permute(position % size, size, seed) < size


def test_permutations_are_fixed_for_good() -> None:
    """A change here breaks the resume of every run that was saved before it."""
    assert [permute(p, 10, 1) for p in range(10)] == GOLDEN_SMALL
    assert [permute(p, 10**9, 1) for p in range(4)] == GOLDEN_LARGE
    assert [block_permute(p, 10**9, windows_of(10**9, 1 << 16), 1) for p in range(4)] == GOLDEN_BLOCKS


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


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 4000), window=st.integers(RUN, 3000), seed=SEEDS)
def test_a_block_shuffle_is_a_permutation_that_stays_in_its_windows(size: int, window: int, seed: int) -> None:
    """Every element once, and at most `window` elements, of whole runs, between first and last use of any window."""
    windows = windows_of(size, window)
    order = [block_permute(position, size, windows, seed) for position in range(size)]
    assert sorted(order) == list(range(size))
    assert (windows == 1) == (size <= window)
    if windows == 1:
        assert order == [permute(position, size, seed) for position in range(size)]
        return
    first = {run: size for run in range(-(-size // RUN))}
    last = dict.fromkeys(first, -1)
    for position, element in enumerate(order):
        first[element // RUN] = min(first[element // RUN], position)
        last[element // RUN] = position
    spans = sorted((first[run], last[run], run) for run in first)
    # cut where no run is in use on both sides: there must be that many cuts, and no window over its limit
    groups: list[list[int]] = []
    end = -1
    for start, stop, run in spans:
        if start > end:
            groups.append([])
        groups[-1].append(min(RUN, size - run * RUN))
        end = max(end, stop)
    assert len(groups) >= windows
    assert max(map(sum, groups)) <= window


def test_equal_windows_leave_no_poorly_mixed_rest() -> None:
    size, window = 33 * RUN - 100, 16 * RUN  # 33 runs: two windows of 16 would leave one of a single run
    order = [block_permute(position, size, windows_of(size, window), 3) // RUN for position in range(size)]
    assert windows_of(size, window) == 3
    assert {len(set(order[start : start + 9 * RUN])) for start in (0, 11 * RUN, size - 9 * RUN)} == {11}


@pytest.mark.parametrize("size", [RUN * 400, RUN * 400 - 77])
def test_runs_go_anywhere_and_windows_are_full_shuffles(size: int) -> None:
    windows, place = windows_of(size, 40 * RUN), np.arange(size)
    assert windows == 10
    tables = []
    for seed in range(2):
        found = np.array([block_permute(position, size, windows, mix(seed)) for position in range(size)])
        tables.append(found)
        # the windows of the 400 runs say where the elements lie: spread by runs, not by elements
        assert abs(np.corrcoef(place, found)[0, 1]) < 4.5 / math.sqrt(size / RUN)
        inside = found[: 39 * RUN]
        assert abs(np.corrcoef(inside[:-1], inside[1:])[0, 1]) < 4.5 / math.sqrt(len(inside))
        assert (abs(np.diff(found)) == 1).sum() < 10 * 12  # Poisson with mean 2 in each window
        # within a window, the offsets in the runs over tenths of the places: 10 x 8 cells, 63 degrees of freedom
        table = np.histogram2d(np.arange(len(inside)), inside % RUN, bins=[10, 8])[0]
        chi_square = ((table - len(inside) / 80) ** 2 / (len(inside) / 80)).sum()
        assert chi_square < 63 + 5 * math.sqrt(2 * 63)
    assert (tables[0] == tables[1]).mean() < 0.001  # another seed, another order
