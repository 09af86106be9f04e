"""data/derived/captions.py against Python's and fastText's ways to split."""

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmfoundry.data.derived import captions as module
from mmfoundry.data.derived.captions import CaptionLength, CaptionTokens, count_words, each_once, words_of
from tests.data.filters.datacomp_reference import tokens

SPACES = " \t\n\r\x0b\x0c\x00\x1c\x1d\x1e\x1f\x85\u00a0\u1680\u2000\u200a\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
texts = st.text(st.one_of(st.sampled_from(SPACES + "ab</s>"), st.characters(exclude_categories=["Cs"])), max_size=30)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.none(), texts), max_size=5))
def test_counts(captions: list[str | None]) -> None:
    table = pl.DataFrame({"caption": pl.Series(captions, dtype=pl.String)})
    made = CaptionLength.compute(table) | CaptionTokens.compute(table)
    counts = {"caption_words": lambda text: len(text.split()), "caption_characters": len}
    counts["caption_tokens"] = lambda text: len(tokens(text))
    for name, count in counts.items():
        assert made[name].dtype == pl.UInt32
        assert made[name].to_list() == [None if text is None else count(text) for text in captions], name


@example([None, "", "b".join(SPACES), SPACES], 2)
@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.none(), texts), max_size=7), st.integers(1, 4))
def test_words(captions: list[str | None], at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROWS_AT_ONCE", at_once)
        words, rows = words_of(pl.Series(captions, dtype=pl.String))
        counts = count_words(pl.Series(captions, dtype=pl.String))
    split = [None if text is None else text.split() for text in captions]
    assert words.to_list() == [word for words in split for word in words or []]
    assert rows.tolist() == [row for row, words in enumerate(split) for _ in words or []]
    assert counts.to_list() == [None if words is None else len(words) for words in split]


def test_every_character_between_two_words() -> None:
    captions = [f"a{chr(code)}b" for code in range(0x30000) if not 0xD800 <= code < 0xE000]
    table = pl.DataFrame({"caption": captions})
    words = CaptionLength.compute(table)["caption_words"]
    assert words.to_list() == [len(text.split()) for text in captions]
    assert CaptionTokens.compute(table)["caption_tokens"].to_list() == [len(tokens(text)) for text in captions]


def test_a_caption_of_a_megabyte() -> None:
    table = pl.DataFrame({"caption": ["dog " * 250_000]})
    assert [column[0] for column in CaptionLength.compute(table).values()] == [250_000, 1_000_000]
    assert CaptionTokens.compute(table)["caption_tokens"][0] == 250_000


@pytest.mark.parametrize("texts", [[], [None], [None, None], ["a"], ["b", None, "a", "b", "", "a", None, "b"]])
def test_each_caption_is_asked_about_once(texts: list[str | None]) -> None:
    each, places = each_once(pl.Series(texts, dtype=pl.String))
    assert sorted(each) == sorted({text for text in texts if text is not None})
    assert each.gather(places).to_list() == texts
