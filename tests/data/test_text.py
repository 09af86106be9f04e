"""tokenize gives open_clip's ids; captions are chosen by the sample's generator."""

import html
from functools import lru_cache
from multiprocessing import reduction
from typing import Any

import ftfy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfoundry.data.clip_words import ClipWords, clean
from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.sample import Sample
from mmfoundry.data.text import ClipTokenizer, choose_caption, clip_tokenizer, tokenize
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

TEXTS = ["a red apple", "", "Ünïcode &amp; 東京 \U0001f34e!", "word " * 200, "two\nlines", "it's 3 o'clock"]


@pytest.mark.parametrize("length", [2, 16, 77])
def test_ids_are_open_clips(length: int) -> None:
    declare_missing_ops()
    import open_clip

    found = tokenize(TEXTS, length)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, open_clip.tokenize(TEXTS, length).numpy())
    np.testing.assert_array_equal(tokenize(TEXTS[0], length), found[:1])
    np.testing.assert_array_equal(tokenize(TEXTS, length), found)  # from the cache


WORDS = st.sampled_from(
    ["don't", "aaaa", "<END_OF_TEXT>", "<start_of_text>x", "&amp;lt;b&amp;gt;", "Ã©tÃ©", "3.14", "!!!?", "İ", "ﬁ"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=12), WORDS), max_size=6))
def test_ids_of_anything_are_open_clips(parts: list[str]) -> None:
    declare_missing_ops()
    from open_clip.tokenizer import SimpleTokenizer

    text = " ".join(parts)
    assert _words().encode(text) == _reference(SimpleTokenizer).encode(text)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40))
def test_plain_ascii_needs_no_mending(text: str) -> None:
    mended = html.unescape(html.unescape(ftfy.fix_text(text)))
    assert clean(text) == " ".join(mended.split()).lower()


@lru_cache(maxsize=1)
def _words() -> ClipWords:
    return ClipWords()


@lru_cache(maxsize=1)
def _reference(kind: type) -> Any:
    return kind()


def test_a_tokenizer_is_sent_to_a_process_by_its_settings() -> None:
    sent = reduction.ForkingPickler.dumps(ClipTokenizer(9))
    assert len(sent) < 500
    assert reduction.ForkingPickler.loads(sent).encode("a " * 30).shape == (9,)


def test_encode_does_not_pad() -> None:
    tokenizer = clip_tokenizer(16)
    assert tokenizer.encode("a red apple").tolist() == [49406, 320, 736, 3055, 49407]
    assert tokenizer.vocab_size == 49408
    assert len(tokenizer.encode("word " * 200)) == 16
    with pytest.raises(ConfigError, match="context length"):
        ClipTokenizer(1)


def test_each_caption_is_as_likely() -> None:
    sample = Sample("a", np.zeros((1, 1, 3), np.uint8), ["one", "two", "three"])
    rng = np.random.default_rng(0)
    drawn = [choose_caption(sample, rng) for _ in range(3000)]
    assert all(abs(drawn.count(text) - 1000) < 120 for text in sample.text)
    sample.text = []
    with pytest.raises(UnreadableSample, match="no caption"):
        choose_caption(sample, rng)
