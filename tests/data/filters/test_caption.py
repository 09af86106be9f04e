"""data/filters/caption.py and laion.py; against DataComp's rules on a whole pool in test_datacomp_parity.py."""

import pytest

from mmfoundry.data.derived.base import derive
from mmfoundry.data.filters.caption import Caption
from mmfoundry.data.filters.laion import Laion2b
from mmfoundry.data.filters.tree import parse_filter
from tests.data.filters.rows import table


def test_caption_counts_fasttexts_tokens() -> None:
    texts = {
        "red dog": True,
        "a dog": False,  # five characters
        "reddog": False,  # one token
        "red\u00a0dog": False,  # a no-break space splits nothing for fastText
        "reddog\n": True,  # a newline is a token
        "red\x00dog": True,
        None: None,
    }
    rows = derive(
        table(*({"caption": text, "language": "en"} for text in texts)).drop("caption_tokens"), ["caption_tokens"]
    )
    rows = derive(rows.drop("caption_characters"), ["caption_characters"])
    assert Caption().keep(rows).to_list() == list(texts.values())


def test_caption_is_its_parts() -> None:
    row = {"caption_tokens": 2, "caption_characters": 6, "language": "en"}
    worse = [row | {"caption_tokens": 1}, row | {"caption_characters": 5}, row | {"language": "de"}]
    rows = table(row, *worse)
    assert Caption().keep(rows).to_list() == [True, False, False, False]
    assert [[*part.keep(rows)] for _, part in Caption().parts()] == [
        [True, False, True, True],
        [True, True, False, True],
        [True, True, True, False],
    ]


def test_laion2b() -> None:
    score = "clip_b32_similarity_score"
    rows = table(
        {score: 0.28, "cld3_language": "en"},
        {score: 0.2799, "cld3_language": "en"},
        {score: 0.5, "cld3_language": "de"},
        {score: float("nan"), "cld3_language": "en"},
        {score: 0.5},
    )
    assert Laion2b().keep(rows).to_list() == [True, False, False, None, None]
    assert Laion2b().columns() == {score, "cld3_language"}
    other = parse_filter({"laion2b": {"min": 0.5, "languages": ["de"]}})
    assert other.keep(rows).to_list() == [False, False, True, None, None]


@pytest.mark.parametrize("name", ["caption", "laion2b"])
def test_steps_of_the_account(name: str) -> None:
    assert all(part.startswith(f"{name}.") for part, _ in parse_filter(name).parts())
