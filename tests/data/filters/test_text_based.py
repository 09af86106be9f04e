"""data/filters/text_based.py on a WordNet of a few words; with DataComp's own rule in test_datacomp_parity.py."""

from pathlib import Path

import polars as pl
import pytest

from mmfoundry.data.filters import text_based
from mmfoundry.data.filters.text_based import NamesEntity, TextBased
from mmfoundry.data.filters.tree import parse_filter
from mmfoundry.pipeline.errors import MissingInput
from tests.data.filters.rows import table
from tests.data.filters.small_wordnet import offset_of, write_wordnet

CAPTIONS = {
    "two Dogs\non the beach": True,
    "a church": True,
    "CHURCHES": True,
    "a dog, barking": False,  # punctuation belongs to the word, as in DataComp's code
    "a\u00a0church": True,  # a no-break space splits words for Python
    "a\x1cchurch\x1d": True,
    "churchyard": False,
    "women": False,
    "": False,
    "   ": False,
    "walking": True,  # the verb's offset is in the list, and offsets are all that is compared
    None: None,
}


@pytest.fixture
def parameters(tmp_path: Path) -> dict[str, str]:
    folder = write_wordnet(tmp_path / "wordnet")
    wanted = [offset_of(folder, "noun", "dog"), offset_of(folder, "noun", "church"), offset_of(folder, "verb", "walk")]
    (tmp_path / "ids.txt").write_text("\n".join(f"n{offset:08d}" for offset in wanted))
    return {"wordnet": str(folder), "synsets": str(tmp_path / "ids.txt")}


def test_words_are_looked_up(parameters: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(*({"caption": caption} for caption in CAPTIONS))
    one = parse_filter({"names_entity": parameters})
    assert one.keep(rows).to_list() == list(CAPTIONS.values())
    monkeypatch.setattr(text_based, "_ROWS_AT_ONCE", 5)  # captions are looked at in pieces
    assert one.keep(rows).to_list() == list(CAPTIONS.values())


def test_english_is_asked_for_as_well(parameters: dict[str, str]) -> None:
    rows = table(
        {"caption": "a dog", "language": "en"},
        {"caption": "a dog", "language": "de"},
        {"caption": "a cat", "language": "en"},
        {"caption": "a dog"},
    )
    one = TextBased(**parameters)
    assert one.keep(rows).to_list() == [True, False, False, None]
    assert [name for name, _ in one.parts()] == ["text_based.names_entity", "text_based.language"]
    assert {str(path) for path in one.files()} == set(parameters.values())


def test_without_captions_wordnet_is_not_needed(tmp_path: Path) -> None:
    nowhere = NamesEntity(wordnet=tmp_path)
    assert nowhere.keep(table({}, {})).to_list() == [None, None]
    with pytest.raises(MissingInput, match="wordnet-base"):
        nowhere.keep(table({"caption": "a dog"}))


def test_long_captions(parameters: dict[str, str]) -> None:
    long = "word " * 200_000
    rows = pl.DataFrame({"uid": ["a", "b"], "caption": [long + "dog", long]})
    assert parse_filter({"names_entity": parameters}).keep(rows).to_list() == [True, False]
