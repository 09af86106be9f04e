import numpy as np
import pytest

from mmfoundry.data.captions import GOOD, OTHER_LANGUAGES, good_captions, other_language_captions, short_captions
from mmfoundry.data.sample_pairs import BAD, Pair, _originals_first, _paste, noisy_pairs
from tests.data.drawn import concept, drawn


def pair(uid: str, of: str | None = None) -> Pair:
    return Pair(concept="x", image=b"", extension="png", captions=[], uid=uid, of=of)


def test_originals_come_before_all_their_duplicates() -> None:
    order = [pair("a2", "a"), pair("a1", "a"), pair("b"), pair("a"), pair("b1", "b")]
    after = [each.uid for each in _originals_first(order)]
    assert sorted(after) == ["a", "a1", "a2", "b", "b1"]
    assert after.index("a") < min(after.index("a1"), after.index("a2"))
    assert after.index("b") < after.index("b1")


def test_pairs_depend_on_the_seed_alone() -> None:
    concepts = [concept(number) for number in range(9)]
    pictures = {each.name: np.array(drawn(number).image) for number, each in enumerate(concepts)}
    first, again, other = (noisy_pairs(concepts, pictures, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert {sample["json"]["truth"]["bad"] for sample in first} == {None, *BAD} - {"language"}  # no word for "thing0"


@pytest.mark.parametrize(("spread", "word"), [(0.0, "middle"), (1.0, None)])
def test_a_pasted_picture_stays_inside_and_is_where_the_word_says(spread: float, word: str | None) -> None:
    for seed in range(20):
        canvas = np.zeros((60, 90, 3), np.uint8)
        said = _paste(canvas, np.full((16, 16, 4), 255, np.uint8), 0.5, spread, np.random.default_rng(seed))
        rows, columns = np.nonzero(canvas[..., 0])
        assert canvas[..., 0].sum() == 255 * 30 * 30
        if word:
            assert said == word
        sides = {"left": columns.mean() < 45, "right": columns.mean() > 45}
        sides |= {"top": rows.mean() < 30, "bottom": rows.mean() > 30, "middle": True}
        assert sides[said]


def test_good_captions_are_different_sentences_about_the_thing() -> None:
    for number in range(6):
        rng = np.random.default_rng(number)
        found = good_captions(concept(number), rng, colour="orange", where="left", count=len(GOOD))
        assert len(set(found)) == len(GOOD)
        assert all(any(name in text for name in concept(number).names) for text in found)
        assert not any("a orange" in text for text in found)
        assert all(3 <= len(text.split()) <= 14 for text in found)


def test_short_captions_are_short_even_for_long_names() -> None:
    found = short_captions(concept(1, name="statue of liberty"), np.random.default_rng(0))
    assert all(len(text.split()) <= 2 for text in found)


def test_sentences_in_other_languages_have_their_word() -> None:
    for language, (templates, words) in OTHER_LANGUAGES.items():
        assert len(words) == 7
        for name, word in words.items():
            found = other_language_captions(name, language)
            assert len(set(found)) == len(templates) == 3
            assert all(word in text for text in found)
    with pytest.raises(KeyError):
        other_language_captions("dog", "fr")
