"""Seeded permutations of a range, element by element: a full shuffle, and one that keeps neighbours in one window.

Only integer arithmetic is used, so that an order does not depend on the version of a random generator. Nothing here
takes memory or time in proportion to the range.
"""

from dataclasses import dataclass
from functools import lru_cache

_MASK = (1 << 64) - 1
_SMALL = 1 << 12  # up to here a permutation is a cached table
_ROUNDS = 6
# Neighbours that a block shuffle keeps together. At 50 KB a sample they are one read of 13 MB, the size that object
# stores serve best; longer runs would leave fewer of them in a window, which then mixes less.
RUN = 256
WINDOW = 1 << 16


def mix(*values: int) -> int:
    """Hash integers to 64 bits (the finaliser of splitmix64, chained); equal on every machine."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = _scramble((state ^ value & _MASK) + 0x9E3779B97F4A7C15 & _MASK)
    return state


def _scramble(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def permute(position: int, size: int, seed: int) -> int:
    """Where `position` goes under a seeded permutation of range(size), in constant memory.

    Up to 4,096 elements it is a shuffled table. Past that it is a Feistel network on the smallest even number of bits
    that holds `size`, walked until the value falls below `size` (at most four times as many values as needed, so fewer
    than four steps on average).

    Args:
        position: 0 <= position < size.
        size: number of elements, at least 1.
        seed: 0 to 2**64 - 1; another seed gives another permutation.
    """
    if size <= _SMALL:
        return _table(size, seed)[position]
    half = (size - 1).bit_length() + 1 >> 1
    low = (1 << half) - 1
    keys = _round_keys(seed)
    while True:
        left, right = position >> half, position & low
        for key in keys:  # `_scramble` written out: this is the inner loop of every draw
            x = right ^ key
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
            x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
            left, right = right, (left ^ x ^ x >> 31) & low
        position = left << half | right
        if position < size:
            return position


def shuffled_range(size: int, seed: int) -> tuple[int, ...]:
    """A seeded shuffle of range(size), whole."""
    return tuple(sorted(range(size), key=lambda element: mix(seed, element)))


_table = lru_cache(maxsize=256)(shuffled_range)


@lru_cache(maxsize=1024)
def _round_keys(seed: int) -> tuple[int, ...]:
    return tuple(mix(seed, number) for number in range(_ROUNDS))


def windows_of(size: int, window: int) -> int:
    """How many windows of at most `window` elements (at least `RUN`) a block shuffle cuts range(size) into."""
    return 1 if size <= window else -(-_runs_of(size) // (window // RUN))


def block_permute(position: int, size: int, windows: int, seed: int) -> int:
    """Where `position` goes under a seeded permutation that works window by window.

    The range is cut into runs of `RUN` neighbours, the last one shorter. The runs are shuffled and dealt out, in that
    order, to windows of equal numbers of runs (give or take one); the positions of a window are a full shuffle of the
    elements of its runs. With one window that is `permute`.

    Args:
        position: 0 <= position < size.
        size: number of elements, at least 1.
        windows: from `windows_of`.
        seed: 0 to 2**64 - 1.
    """
    if windows == 1:
        return permute(position, size, seed)
    runs = _runs_of(size)
    missing = runs * RUN - size
    short = _short_slot(runs, missing, seed)
    slot = (position if position < (short + 1) * RUN - missing else position + missing) // RUN
    window = _window(size, windows, ((slot + 1) * windows - 1) // runs, seed)
    place = permute(position - window.start, window.size, window.seed)
    if place >= window.turn:
        place += missing
    return window.firsts[place // RUN] + place % RUN


@dataclass(frozen=True, slots=True)
class _Window:
    start: int  # its first position
    size: int
    seed: int
    firsts: tuple[int, ...]  # the first element of each of its runs
    turn: int  # place in it where the shorter run ends; its size if it has none


@lru_cache(maxsize=1024)
def _window(size: int, windows: int, number: int, seed: int) -> _Window:
    runs = _runs_of(size)
    missing = runs * RUN - size
    short = _short_slot(runs, missing, seed)
    first, end = number * runs // windows, (number + 1) * runs // windows
    inside = first <= short < end
    elements = (end - first) * RUN - inside * missing
    return _Window(
        start=first * RUN - (short < first) * missing,
        size=elements,
        seed=mix(seed, 6, number),
        firsts=tuple(_run_at(slot, runs, short, seed) * RUN for slot in range(first, end)),
        turn=(short - first + 1) * RUN - missing if inside else elements,
    )


def _runs_of(size: int) -> int:
    return -(-size // RUN)


def _short_slot(runs: int, missing: int, seed: int) -> int:
    """Where the last and shorter run comes among the shuffled ones; `runs`, which is nowhere, if it is a whole one."""
    return mix(seed, 5) % runs if missing else runs


def _run_at(slot: int, runs: int, short: int, seed: int) -> int:
    """The run that comes at a slot. The shorter one has its place already; the others are shuffled around it."""
    if slot == short:
        return runs - 1
    whole = runs if short == runs else runs - 1
    return permute(slot - (slot > short), whole, mix(seed, 7))
