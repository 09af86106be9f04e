"""`caption_near_duplicate` against the similarity of sets of n-grams."""

import re

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfoundry.data import hamming
from mmfoundry.data.filters.minhash import NUM_HASHES, CaptionNearDuplicate, signatures
from tests.data.filters.cutting import assert_cuts_do_not_matter
from tests.data.filters.rows import table, uid

WORDS = [f"word{number}" for number in range(40)]


def grams(caption: str, count: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", caption.lower()) or [caption.strip()]
    return {tuple(words[i : i + count]) for i in range(max(len(words) - count + 1, 1))}


def similarity(one: str, other: str, count: int) -> float:
    a, b = grams(one, count), grams(other, count)
    return len(a & b) / len(a | b)


def test_signatures_estimate_the_similarity() -> None:
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(300):
        words = rng.choice(WORDS, 30).tolist()
        changed = [str(rng.choice(WORDS)) if rng.random() < 0.08 else word for word in words]
        pair = [" ".join(words), " ".join(changed)]
        for count in (1, 3):
            found = signatures(pair, count)
            errors.append(float((found[0] == found[1]).mean()) - similarity(*pair, count))
    # 64 hashes: a standard error of at most 1/16; without bias
    assert np.std(errors) < 1 / 16
    assert abs(np.mean(errors)) < 4 / 16 / len(errors) ** 0.5


def test_case_and_marks_do_not_matter_words_do() -> None:
    captions = ["A red dog, on a beach!", "a RED dog on a beach", "a red dog on a hill", "", "  ", "🐕!", "🐕?"]
    same = (signatures(captions, 3)[:, None] == signatures(captions, 3)[None]).all(axis=2)
    assert same[0, 1]
    assert same[3, 4]
    assert not same[0, 2]
    assert not same[5, 6]


@st.composite
def pools(draw: st.DrawFn) -> pl.DataFrame:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bases = [rng.choice(WORDS, 25).tolist() for _ in range(3)]
    rows = []
    for number, one in enumerate(rng.permutation(draw(st.integers(0, 25))).tolist()):
        for i in range(draw(st.integers(1, 2))):
            words = [str(rng.choice(WORDS)) if rng.random() < 0.02 else word for word in bases[rng.integers(3)]]
            caption = " ".join(words) if draw(st.integers(0, 9)) else draw(st.sampled_from([None, "", "two words"]))
            rows.append({"uid": uid(one), "index": number, "caption_index": i, "caption": caption})
    return table(*rows)


@settings(max_examples=40, deadline=None)
@given(st.data(), pools(), st.sampled_from([0.1, 0.5, 0.7, 0.75, 1.0]), st.booleans())
def test_verdicts_follow_from_signatures_in_the_order_of_uids(
    data: st.DataObject, rows: pl.DataFrame, similarity: float, many: bool
) -> None:
    """All pairs are compared here, and with few bands or many none may be missed."""
    one = CaptionNearDuplicate(min_similarity=similarity)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hamming, "MANY", 0 if many else 1000)
        found = assert_cuts_do_not_matter(one, rows, data)
    captions = rows.with_row_index("row").drop_nulls("caption").sort("uid", "caption_index")
    hashes = signatures(captions["caption"].to_list(), 3)
    expected: list[bool | None] = [None] * rows.height
    kept: list[int] = []
    for number, row in enumerate(captions["row"].to_list()):
        expected[row] = all((hashes[number] == hashes[other]).mean() < similarity for other in kept)
        kept += [number] if expected[row] else []
    assert found == expected


def test_the_smallest_uid_stays_and_a_sample_keeps_its_other_captions() -> None:
    caption = "a red dog on a beach in the evening sun"
    rows = table(
        {"uid": uid(5), "index": 0, "caption": caption},
        {"uid": uid(5), "index": 0, "caption_index": 1, "caption": "something else altogether"},
        {"uid": uid(2), "index": 1, "caption": caption.upper()},
        {"uid": uid(2), "index": 1, "caption_index": 1, "caption": caption},
        {"uid": uid(7), "index": 2, "caption": None, "caption_index": None},
    )
    assert CaptionNearDuplicate().keep(rows).to_list() == [False, True, True, False, None]


def test_large_groups_of_equal_captions_are_cheap() -> None:
    rows = table(*({"uid": uid(n), "caption": f"the same caption {'!' * (n % 3)}"} for n in range(3000)))
    assert CaptionNearDuplicate().keep(rows).sum() == 1
    assert signatures(["x"], 1).shape == (1, NUM_HASHES)
