"""data/wordnet.py against NLTK, on a WordNet of a few words and, where there is one, on Princeton's."""

import random
import zipfile
from pathlib import Path

import pytest

from mmfoundry.data.wordnet import (
    WordNet,
    find_wordnet,
    imagenet21k_file,
    load_wordnet,
    read_synset_ids,
    wordnet_places,
)
from mmfoundry.pipeline.errors import DamagedInput, MissingInput
from tests.data.filters.nltk_wordnet import copy_for_nltk, nltk_reader
from tests.data.filters.small_wordnet import EXCEPTIONS, WORDS, offset_of, write_wordnet

FORMS = ("{}", "{}s", "{}es", "{}ed", "{}ing", "{}er", "{}est", "{}ses", "{}ies", "{}men", "{}'s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wordnet(tmp_path_factory.mktemp("wordnet"))


@pytest.mark.parametrize(
    ("word", "part", "name"),
    [
        ("dog", "noun", "dog"),  # not its second meaning, not the verb
        ("DOGS", "noun", "dog"),
        ("churches", "noun", "church"),
        ("women", "noun", "woman"),  # an exception
        ("firemen", None, None),
        ("knives", "noun", "knife"),
        ("bus", "noun", "bus"),  # itself, though "bu" would be a rule away
        ("glasses", "noun", "glasses"),  # itself before what it may be a form of
        ("running", "noun", "running"),  # a noun before the verb
        ("runs", "noun", "run"),
        ("was", "noun", "wa"),  # the noun's rules come before the verb's exceptions: NLTK finds "wa" too
        ("baking", "verb", "bake"),
        ("tried", None, None),  # "ies" is a rule for verbs, "ied" is none
        ("tries", "verb", "try"),
        ("better", "adj", "good"),  # an adjective before the adverb
        ("biggest", "adj", "big"),
        ("nicer", "adj", "nice"),
        ("quickly", "adv", "quickly"),
        ("nobodies", None, None),  # an exception of a word that is not there; rules are not tried then
        ("dog,", None, None),
        ("", None, None),
        ("s", None, None),
        ("犬", None, None),
    ],
)
def test_first_synset(folder: Path, word: str, part: str | None, name: str | None) -> None:
    expected = None if part is None else offset_of(folder, part, str(name))
    assert load_wordnet(folder).first_synset(word) == expected


def reader_of(folder: Path):
    pytest.importorskip("nltk", reason="NLTK is not installed (pip install nltk)")
    return nltk_reader(folder)


def differing_from_nltk(wordnet: WordNet, words: list[str], reader) -> tuple[int, list[str]]:
    """How many words have a synset, and which get another one here than from NLTK."""
    firsts = [next((synset.offset() for synset in reader.synsets(word)), None) for word in words]
    differing = [word for word, first in zip(words, firsts, strict=True) if wordnet.first_synset(word) != first]
    return len(words) - firsts.count(None), differing


def is_inflected_twice(wordnet: WordNet, word: str, reader) -> bool:
    """Whether what is found here is found by NLTK once an ending is off: from 3.9 on it takes off one, not several."""
    endings = ("s", "es", "ed", "ing", "er", "est", "men", "ses")
    shorter = [word[: -len(ending)] + more for ending in endings if word.endswith(ending) for more in ("", "e", "man")]
    shorter += [word[: -len(ending)] + ending[:-2] for ending in ("ses", "xes", "zes", "ches", "shes")]
    shorter += [word[:-3] + ending for ending in ("f", "y")]
    return wordnet.first_synset(word) in {synset.offset() for form in shorter for synset in reader.synsets(form)}


def test_small_wordnet_by_nltk(folder: Path) -> None:
    words = [form.format(word) for part in WORDS.values() for word in part for form in FORMS]
    words += [form for part in EXCEPTIONS.values() for form in part]
    reader, wordnet = reader_of(folder), load_wordnet(folder)
    known, differing = differing_from_nltk(wordnet, words, reader)
    assert known > 90
    # NLTK 3.8.1 agrees on every word; later ones take one ending off, and most of these words have two
    assert len(differing) < 0.1 * len(words)
    assert all(is_inflected_twice(wordnet, word, reader) for word in differing)


def test_a_zip_file_as_nltk_downloads_it(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "wordnet.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, f"wordnet/{path.name}")
    assert load_wordnet(tmp_path / "wordnet.zip") == load_wordnet(folder)


def test_where_it_is_looked_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WNSEARCHDIR", "WNHOME", "NLTK_DATA"):
        monkeypatch.delenv(variable, raising=False)
    assert wordnet_places()[-1] == Path("/usr/share/wordnet")
    monkeypatch.setenv("WNSEARCHDIR", str(folder))
    assert find_wordnet() == folder
    monkeypatch.delenv("WNSEARCHDIR")
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "wordnet").symlink_to(folder)
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    assert find_wordnet() == tmp_path / "corpora" / "wordnet"
    with pytest.raises(MissingInput, match=r"apt-get install wordnet-base.* or name its folder in WNSEARCHDIR"):
        find_wordnet(tmp_path)


def test_damaged(folder: Path, tmp_path: Path) -> None:
    write_wordnet(tmp_path)
    (tmp_path / "index.verb").write_text("run v many 1 @ 1 0 00000001\n")
    with pytest.raises(DamagedInput, match=r"index\.verb: 'run v many"):
        load_wordnet(tmp_path)
    (tmp_path / "index.verb").unlink()
    with pytest.raises(DamagedInput, match=r"index\.verb"):
        load_wordnet(tmp_path)


def test_synset_ids(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("n01440764\nn00000007\n\n")
    assert read_synset_ids(path) == {1440764, 7}
    path.write_text("n01440764\nfish\n")
    with pytest.raises(DamagedInput, match="line 2 is 'fish'"):
        read_synset_ids(path)
    with pytest.raises(MissingInput):
        read_synset_ids(tmp_path / "none")


def test_imagenet21k() -> None:
    ids = read_synset_ids(imagenet21k_file())
    assert len(ids) == 21841
    assert {1440764, 2084071} <= ids  # tench, dog


def princetons() -> Path:
    try:
        return find_wordnet()
    except MissingInput as error:
        pytest.skip(f"WordNet is not here: {error}")


def test_imagenets_ids_are_wordnets() -> None:
    lines = (princetons() / "index.noun").read_text("utf-8").splitlines()
    offsets = {int(field) for line in lines for field in line.split() if len(field) == 8 and field.isdecimal()}
    assert read_synset_ids(imagenet21k_file()) <= offsets


@pytest.mark.slow
def test_princetons_wordnet_by_nltk(tmp_path: Path) -> None:
    place = princetons()
    wordnet, reader = load_wordnet(place), reader_of(copy_for_nltk(place, tmp_path))
    lemmas = sorted({lemma for part in wordnet.first.values() for lemma in part})
    draw = random.Random(0)
    words = [form.format(lemma) for lemma in draw.sample(lemmas, 20_000) for form in ("{}", draw.choice(FORMS))]
    known, differing = differing_from_nltk(wordnet, words, reader)
    assert known > 20_000
    # NLTK 3.8.1 agrees on every word; later ones take one ending off, and most of these words have two
    assert len(differing) < 0.1 * len(words)
