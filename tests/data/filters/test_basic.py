"""data/filters/basic.py against DataComp's rules, written out row by row."""

import random

import numpy as np
import polars as pl
import pytest

from mmfoundry.data.derived.language import languages_of
from mmfoundry.data.filters.base import Filter
from mmfoundry.data.filters.basic import Basic, CaptionWords, Language, MaxAspect, MinSide, NotBlank
from tests.data.filters.rows import table

CAPTIONS = (
    "a dog that runs on the beach",
    "two words",
    "one two three",
    "I am",
    "a b c",
    "a bc d",
    "",
    "   spaces   around   here  ",
    "ein Hund läuft am Strand entlang",
    "un chien qui court sur la plage",
    "これは犬の写真です",
    "a dog\nthat runs\ton the\u00a0beach",
    "🍎 🍏 🍎",
    "\x00\x00 zero bytes here",
    "THE RED HOUSE ON THE HILL",
)
SIDES = (0, 1, 199, 200, 201, 299, 599, 600, 601, 603)


def datacomp_basic(text: str, language: str, width: int, height: int) -> bool:
    """The rule as the paper's appendix and the baselines state it."""
    words, characters = len(text.split()), len(text)
    with np.errstate(divide="ignore", invalid="ignore"):
        shorter, longer = np.minimum(width, height), np.maximum(width, height)
        aspect = np.float64(longer) / np.float64(shorter)
    return bool(language == "en" and words > 2 and characters > 5 and shorter >= 200 and aspect <= 3.0)


def drawn_pairs(count: int) -> list[tuple[str, int, int]]:
    draw = random.Random(0)
    return [(draw.choice(CAPTIONS), draw.choice(SIDES), draw.choice(SIDES)) for _ in range(count)]


def test_basic_is_datacomps() -> None:
    pairs = drawn_pairs(3000)
    languages, _ = languages_of([text for text, _, _ in pairs])
    rows = [
        {
            "caption": text,
            "caption_words": len(text.split()),
            "caption_characters": len(text),
            "language": language,
            "width": width,
            "height": height,
        }
        for (text, width, height), language in zip(pairs, languages, strict=True)
    ]
    expected = [datacomp_basic(text, language, w, h) for (text, w, h), language in zip(pairs, languages, strict=True)]
    assert 0.02 < np.mean(expected) < 0.5
    assert Basic().keep(table(*rows)).fill_null(False).to_list() == expected


def test_basic_is_its_parts() -> None:
    pairs = drawn_pairs(300)
    rows = [
        {"caption_words": len(text.split()), "caption_characters": len(text), "language": "en", "width": w, "height": h}
        for text, w, h in pairs
    ]
    basic = Basic(min_words=2, min_characters=10, min_side=199, max_aspect=1.5)
    parts = [part.keep(table(*rows)).fill_null(False) for _, part in basic.parts()]
    together = pl.select(pl.all_horizontal(parts)).to_series()
    assert together.to_list() == basic.keep(table(*rows)).fill_null(False).to_list()
    assert 0 < together.sum() < len(rows)


@pytest.mark.parametrize(
    ("one", "at", "past"),
    [
        (CaptionWords(min_words=3), {"caption_words": 3}, {"caption_words": 2}),
        (CaptionWords(min_words=0, max_words=4), {"caption_words": 4}, {"caption_words": 5}),
        (MinSide(pixels=32), {"width": 32, "height": 99}, {"width": 31, "height": 99}),
        (MaxAspect(ratio=2.5), {"width": 100, "height": 40}, {"width": 101, "height": 40}),
        (MaxAspect(ratio=2.5), {"width": 40, "height": 100}, {"width": 40, "height": 101}),
        (Language(languages=["de", "fr"]), {"language": "fr"}, {"language": "en"}),
        (
            Language(min_probability=0.5),
            {"language": "en", "language_probability": 0.5},
            {"language": "en", "language_probability": 0.4},
        ),
        (NotBlank(min_deviation=2.0), {"pixel_deviation": 2.0}, {"pixel_deviation": 1.9}),
    ],
)
def test_limits_are_inclusive(one: Filter, at: dict, past: dict) -> None:
    assert one.keep(table(at, past)).to_list() == [True, False]


def test_probability_is_read_only_where_it_counts() -> None:
    assert Language().columns() == {"language"}
    assert Language(min_probability=0.1).columns() == {"language", "language_probability"}
