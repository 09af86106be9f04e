"""data/filters/dedup.py and near_duplicate.py against pairwise comparison, in any order of the rows."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfoundry.data import hamming
from mmfoundry.data.filters import dedup
from mmfoundry.data.filters.dedup import ExactDuplicate, UniqueUid
from mmfoundry.data.filters.near_duplicate import NearDuplicate
from mmfoundry.data.hamming import Nearness, leaders, near_pairs, words_of
from tests.data.filters.cutting import assert_cuts_do_not_matter, keep_in_parts
from tests.data.filters.rows import table, uid


def plain_leaders(hashes: np.ndarray, radius: int) -> list[bool]:
    """One by one: a row stays unless an earlier one that stays is near."""
    bits = np.unpackbits(hashes, axis=1)
    kept: list[int] = []
    for row in range(len(bits)):
        if all((bits[row] != bits[other]).sum() > radius for other in kept):
            kept.append(row)
    return [row in kept for row in range(len(bits))]


@st.composite
def clustered_hashes(draw: st.DrawFn) -> np.ndarray:
    """Hashes around a few centres, so that distances on both sides of a radius occur."""
    width, count = draw(st.sampled_from([1, 3, 8, 64])), draw(st.integers(0, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    centres = rng.integers(0, 256, (3, width), dtype=np.uint8)
    flips = rng.random((count, width * 8)) < draw(st.sampled_from([0.0, 0.02, 0.1, 0.5]))
    return centres[rng.integers(0, 3, count)] ^ np.packbits(flips, axis=1)


@settings(max_examples=80, deadline=None)
@given(clustered_hashes(), st.integers(0, 60))
def test_leaders_are_those_of_pairwise_comparison(hashes: np.ndarray, radius: int) -> None:
    radius = min(radius, hashes.shape[1] * 8 - 1)
    nearness = Nearness(radius, hashes.shape[1] * 8)
    assert leaders(words_of(hashes), nearness).tolist() == plain_leaders(hashes, radius)


@settings(max_examples=60, deadline=None)
@given(clustered_hashes(), st.integers(0, 60), st.sampled_from([0.0, 8.0]), st.sampled_from([0, 20]))
def test_prefixes_change_nothing(hashes: np.ndarray, radius: int, crowded: float, rounds: int) -> None:
    """Whether crowds are taken out first, and whether rows are settled at once or one by one."""
    radius = min(radius, hashes.shape[1] * 8 - 1)
    small = {"_FIRST": 2, "_GROWTH": 2, "_CROWDED": crowded, "_ROUNDS": rounds, "_ROWS_AT_ONCE": 4, "_PAIRS_AT_ONCE": 3}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.items():
            patch.setattr(hamming, name, value)
        found = leaders(words_of(hashes), Nearness(radius, hashes.shape[1] * 8))
    assert found.tolist() == plain_leaders(hashes, radius)


def test_a_crowd_costs_no_comparison_of_all_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    flips = rng.random((20_000, 64)) < 0.04  # so that 200 million pairs are near, of 8 bytes each
    hashes = np.packbits(flips, axis=1)
    compared = 0
    near = Nearness.near

    def counted(self: Nearness, words: np.ndarray, ones: np.ndarray, others: np.ndarray) -> object:
        nonlocal compared
        compared += len(ones)
        return near(self, words, ones, others)

    monkeypatch.setattr(Nearness, "near", counted)
    stays = leaders(words_of(hashes), Nearness(10, 64))
    assert 0 < stays.sum() < 200
    assert compared < 10_000_000


@settings(max_examples=100, deadline=None)
@given(clustered_hashes(), st.integers(0, 60))
def test_near_pairs_misses_none(hashes: np.ndarray, radius: int) -> None:
    radius = min(radius, hashes.shape[1] * 8 - 1)
    bits = np.unpackbits(hashes, axis=1)
    near = (bits[:, None] != bits[None]).sum(axis=2) <= radius if len(bits) else np.zeros((0, 0), bool)
    expected = [(later, earlier) for later in range(len(bits)) for earlier in range(later) if near[later, earlier]]
    for many in (0, 1000):  # changes the time it takes only
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hamming, "MANY", many)
            assert list(map(tuple, near_pairs(words_of(hashes), Nearness(radius, hashes.shape[1] * 8)))) == expected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_stays_does_not_depend_on_the_order(data: st.DataObject) -> None:
    hashes = data.draw(clustered_hashes())
    count = len(hashes)
    uids = data.draw(st.permutations([uid(number) for number in range(count)]))
    order = data.draw(st.permutations(range(count)))
    rows = table(
        *({"uid": uids[i], "perceptual_hash": hashes[i].tobytes(), "sha256": hashes[i].tobytes()} for i in range(count))
    )
    for one in (NearDuplicate(radius=3), ExactDuplicate()):
        straight = set(rows.filter(one.keep(rows))["uid"])
        shuffled = rows[order] if count else rows
        assert set(shuffled.filter(one.keep(shuffled))["uid"]) == straight
        assert count == 0 or uid(0) in straight, "the smallest uid always stays"


def test_exact_keeps_one_of_each() -> None:
    same, other = {"sha256": b"s" * 32}, {"sha256": b"o" * 32}
    rows = table({"uid": uid(5), **same}, {"uid": uid(3), **same}, {"uid": uid(4), **other}, {"uid": uid(9)})
    assert ExactDuplicate().keep(rows).to_list() == [False, True, True, None]


def test_all_captions_of_a_sample_share_its_fate() -> None:
    """Rows of one sample have one hash; they are not duplicates of each other."""
    first = {"uid": uid(1), "index": 0, "sha256": b"s" * 32, "perceptual_hash": bytes(64)}
    second = first | {"uid": uid(2), "index": 1}
    rows = table(first, first | {"caption_index": 1}, second, second | {"caption_index": 1})
    assert ExactDuplicate().keep(rows).to_list() == [True, True, False, False]
    assert NearDuplicate(radius=0).keep(rows).to_list() == [True, True, False, False]
    assert UniqueUid().keep(rows).to_list() == [True] * 4


def test_a_chain_is_thinned_not_collapsed() -> None:
    step = [bytes([255] * n + [0] * (64 - n)) for n in range(4)]  # 8 bits from one to the next
    rows = table(*({"uid": uid(n), "perceptual_hash": step[n]} for n in range(4)))
    assert NearDuplicate(radius=8).keep(rows).to_list() == [True, False, True, False]


def test_a_uid_names_the_first_sample_that_has_it() -> None:
    rows = table({"uid": uid(7), "shard": 1, "index": 0}, {"uid": uid(7), "shard": 0, "index": 9}, {"uid": uid(8)})
    assert UniqueUid().keep(rows).to_list() == [False, True, True]


def test_large_groups_of_equal_hashes_are_cheap() -> None:
    rows = pl.DataFrame({"uid": [uid(n) for n in range(20_000)], "perceptual_hash": [bytes(64)] * 20_000})
    assert NearDuplicate(radius=24).keep(rows).sum() == 1


@st.composite
def pools(draw: st.DrawFn) -> pl.DataFrame:
    """Samples of which some share a uid, bytes or looks; some have two captions, some no image."""
    hashes = draw(clustered_hashes().filter(lambda found: found.shape[1] == 8))
    rows = []
    for number, one in enumerate(hashes):
        seen = {} if draw(st.integers(0, 9)) == 0 else {"perceptual_hash": one.tobytes(), "sha256": one[:1].tobytes()}
        place = {"uid": uid(draw(st.integers(0, 2 * len(hashes))) * 2**60), "shard": number % 3, "index": number}
        captions = draw(st.lists(st.sampled_from("ab"), min_size=1, max_size=2))
        rows += [place | seen | {"caption_index": i, "caption": text} for i, text in enumerate(captions)]
    return table(*rows)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_no_verdict_depends_on_how_the_pool_is_cut(data: st.DataObject) -> None:
    rows = data.draw(pools())
    for one in (NearDuplicate(radius=3), ExactDuplicate(), UniqueUid()):
        assert_cuts_do_not_matter(one, rows, data)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_verdicts_are_those_of_looking_at_all_rows_together(data: st.DataObject) -> None:
    rows = data.draw(pools())
    place = pl.col("shard").cast(pl.UInt64) * 2**32 + pl.col("index")
    first = place == place.min().over("uid")
    assert assert_cuts_do_not_matter(UniqueUid(), rows, data) == rows.select(first).to_series().to_list()
    smallest = pl.when(pl.col("sha256").is_not_null()).then(pl.col("uid") == pl.col("uid").min().over("sha256"))
    assert assert_cuts_do_not_matter(ExactDuplicate(), rows, data) == rows.select(smallest).to_series().to_list()


def test_repeats_of_a_uid_are_told_from_conflicts() -> None:
    def sample(number: int, index: int, *captions: str) -> list[dict[str, object]]:
        place = {"uid": uid(number), "shard": 0, "index": index}
        return [place | {"caption_index": i, "caption": text} for i, text in enumerate(captions)]

    rows = [
        *sample(1, 0, "a", "b"),
        *sample(1, 1, "a", "b"),
        *sample(2, 2, "a"),
        *sample(2, 3, "c"),
        *sample(3, 4, "a"),
    ]
    pool, one = table(*rows), UniqueUid()
    state = one.merge([one.partial(pool[part], []).lazy() for part in ([0, 1, 4], [2, 3, 5, 6])], [])
    assert state.select("low", "samples").rows() == [(1, 2), (2, 2)]


def test_turns_find_what_one_turn_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks of a pool that is too large for memory are looked at a share at a time."""
    rows = table(*({"uid": uid(n * 7919 % 50), "index": n} for n in range(100)))
    whole = keep_in_parts(UniqueUid(), [rows[:30], rows[30:]]).to_list()
    assert sum(bool(one) for one in whole) == 50
    monkeypatch.setattr(dedup, "_ROWS_A_TURN", 9)
    assert keep_in_parts(UniqueUid(), [rows[:30], rows[30:]]).to_list() == whole
