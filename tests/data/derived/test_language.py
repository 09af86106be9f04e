"""data/derived/language.py against fastText and CLD3 themselves, called as DataComp calls them."""

from pathlib import Path

import polars as pl
import pytest

from mmfoundry.data.derived.base import Models, derive, files_of
from mmfoundry.data.derived.language import Cld3Language, Language, _cld3, _fasttext, languages_of
from mmfoundry.pipeline.errors import DamagedInput, MissingInput
from tests.data.derived.small_fasttext import write_model

CAPTIONS = (
    "a dog that runs on the beach",
    "ein Hund läuft am Strand entlang",
    "un chien qui court\nsur la plage",
    "\n",
    "",
    None,
    "12345",
    "🍎 🍏",
    "\x00\x00 zero bytes here",
    "كلب على الشاطئ",
    "これは犬の写真です",
    "the dog ran away " * 60_000,
)
TABLE = pl.DataFrame({"caption": pl.Series(CAPTIONS, dtype=pl.String)})


def test_fasttexts_first_guess() -> None:
    made = Language.compute(TABLE)
    for caption, code, probability in zip(CAPTIONS, made["language"], made["language_probability"], strict=True):
        if caption is None:
            assert (code, probability) == (None, None)
            continue
        labels, scores = _fasttext().predict(caption.replace("\n", " "))
        assert code == labels[0].removeprefix("__label__")
        assert probability == pytest.approx(min(scores[0], 1.0), abs=1e-6)
    assert made["language"][:3].to_list() == ["en", "de", "fr"]
    assert made["language"][4] == "en", "the model's prior, which DataComp's code takes for English as well"


def test_a_model_of_the_users_own(tmp_path: Path) -> None:
    """Who has lid.176.bin gets DataComp's own guesses."""
    models = Models(write_model(tmp_path / "lid.bin", {"dog": "de", "Hund": "en", "chien": "fr"}))
    made = derive(TABLE[:3], ["language"], models)
    assert made["language"].to_list() == ["de", "en", "fr"]
    assert made["language_probability"].to_list() == pytest.approx([1.0] * 3, abs=0.01)
    assert derive(TABLE[:3], ["language"])["language"].to_list() == ["en", "de", "fr"]
    assert files_of(["language_probability", "caption_words"], models) == (models.language,)
    assert files_of(["caption_words"], models) == ()


def test_a_model_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"language_model: .*lid\.bin is no file"):
        derive(TABLE, ["language"], Models(tmp_path / "lid.bin"))
    for content in (b"", b"no model at all", b"\xba\x16\x4f\x2f" + b"\x0c" * 40):
        (tmp_path / "lid.bin").write_bytes(content)
        with pytest.raises(DamagedInput, match=r"lid\.bin is no model of fastText"):
            derive(TABLE, ["language"], Models(tmp_path / "lid.bin"))


def test_text_that_is_no_unicode() -> None:
    assert languages_of(["a dog \ud800 that runs on the beach"])[0] == ["en"]


def test_cld3s_guess() -> None:
    gcld3 = pytest.importorskip("gcld3", reason="CLD3 is not installed (pip install cld3-py)")
    find = gcld3.NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=1000).FindLanguage
    expected = [None if text is None else find(text=text.replace("\n", " ")).language for text in CAPTIONS]
    made = Cld3Language.compute(TABLE)["cld3_language"]
    assert made.to_list() == expected
    assert made[1:3].to_list() == ["de", "fr"]


def test_without_cld3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcld3", None)
    _cld3.cache_clear()
    with pytest.raises(MissingInput, match=r"pip install 'mmfoundry\[filter\]'"):
        Cld3Language.compute(TABLE)
    nothing = TABLE.filter(pl.col("caption").is_null())
    assert Cld3Language.compute(nothing)["cld3_language"].to_list() == [None]
    _cld3.cache_clear()
