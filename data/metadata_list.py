"""The list of entries that MetaCLIP balances a pool by: what captions may speak of.

CLIP's and MetaCLIP's list (Xu et al. 2023, arXiv 2309.16671, section 3.1) has 500,000 entries of four kinds: names of
WordNet's synsets, words of Wikipedia that occur at least 100 times, pairs of words with high mutual information, and
titles of its articles. It starts with the numbers from 0 to 99. Here WordNet is read from its files, and everything
else comes from text files of the user's.
"""

import json
import string
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import Field

from mmfoundry.data.wordnet import PARTS_OF_SPEECH, find_wordnet
from mmfoundry.pipeline.config import Config
from mmfoundry.pipeline.errors import DamagedInput, MissingInput

MAX_ENTRIES = 500_000
MAX_CHARACTERS = 256
_PUNCTUATION = frozenset(string.punctuation + "，。、；：？¿！“”‘’（）【】《》〈〉「」『』～—")


class TextSource(Config):
    """A text file of entries, one a line; after a tab there may be a score, a count for instance."""

    path: Path = Field(description="the file, UTF-8")
    min_score: float | None = Field(None, description="entries below are left out; MetaCLIP: 100 for counts of words")
    top: int | None = Field(None, ge=0, description="so many entries with the highest scores are taken")


def build_entries(
    sources: Iterable[TextSource] = (), wordnet: Path | bool | None = None, max_entries: int = MAX_ENTRIES
) -> list[str]:
    """Numbers from 0 to 99, then names of WordNet's synsets, then the sources' entries, each once.

    Entries of punctuation alone, and ones longer than 256 characters, are left out.

    Args:
        sources: in order of precedence.
        wordnet: its folder; None looks in the usual places, False leaves it out.
        max_entries: where the list ends.
    Raises:
        MissingInput: WordNet or a file is not there.
        DamagedInput: a file is not what it should be.
    """
    found = dict.fromkeys(str(number) for number in range(100))
    if wordnet is not False:
        found |= dict.fromkeys(filter(_is_entry, synset_names(None if wordnet is True else wordnet)))
    for source in sources:
        found |= dict.fromkeys(filter(_is_entry, _entries_of(source)))
    return list(found)[:max_entries]


def synset_names(wordnet: Path | None = None) -> Iterator[str]:
    """The name of each synset as MetaCLIP takes it: its first lemma in lower case, up to a point, with spaces.

    Args:
        wordnet: its folder or zip file; None looks in the usual places.
    """
    found = find_wordnet(wordnet)
    for part in PARTS_OF_SPEECH:
        for line in _lines(found, f"data.{part}"):
            fields = line.split(" ", 5)
            if line.startswith(" ") or len(fields) < 6:  # the licence, the end
                continue
            lemma = fields[4].partition("(")[0]  # a marker of the place of an adjective, "(p)"
            yield lemma.lower().partition(".")[0].replace("_", " ")


def wordnet_files(wordnet: Path | None = None) -> tuple[Path, ...]:
    """The files that names of synsets are read from.

    Raises:
        MissingInput: WordNet is not there.
    """
    found = find_wordnet(wordnet)
    return (found,) if found.suffix == ".zip" else tuple(found / f"data.{part}" for part in PARTS_OF_SPEECH)


def read_entries(path: Path) -> list[str]:
    """The entries of a file, each once.

    Args:
        path: `.json`: a list of strings, as MetaCLIP publishes it, or an object whose keys are the entries; otherwise
            text with one a line.
    Raises:
        MissingInput: there is no such file.
        DamagedInput: it is not such a file, or has no entry.
    """
    text = _text(path)
    if path.suffix == ".json":
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DamagedInput(f"{path}: not JSON: {error}") from error
        if not isinstance(found, list | dict) or not all(isinstance(entry, str) for entry in found):
            raise DamagedInput(f"{path}: neither a list of strings nor an object")
    else:
        found = [line.partition("\t")[0] for line in text.splitlines()]
    entries = list(dict.fromkeys(entry for entry in found if entry))
    if not entries:
        raise DamagedInput(f"{path}: no entry in it")
    return entries


def _entries_of(source: TextSource) -> list[str]:
    rows = []
    for number, line in enumerate(_text(source.path).splitlines(), start=1):
        entry, tab, score = line.partition("\t")
        try:
            rows.append((entry.strip(), float(score) if tab else 0.0))
        except ValueError as error:
            raise DamagedInput(f"{source.path}: line {number}: {score[:40]!r} after the tab is no score") from error
    if source.min_score is not None:
        rows = [row for row in rows if row[1] >= source.min_score]
    if source.top is not None:
        rows = sorted(rows, key=lambda row: -row[1])[: source.top]
    return [entry for entry, _ in rows]


def _is_entry(entry: str) -> bool:
    return 0 < len(entry) <= MAX_CHARACTERS and not _PUNCTUATION.issuperset(entry)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise MissingInput(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DamagedInput(f"{path}: not UTF-8 text at byte {error.start}") from error


def _lines(wordnet: Path, name: str) -> list[str]:
    if wordnet.suffix != ".zip":
        return _text(wordnet / name).split("\n")
    try:
        with zipfile.ZipFile(wordnet) as archive:
            return archive.read(f"wordnet/{name}").decode("utf-8").split("\n")
    except (OSError, KeyError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise DamagedInput(f"{wordnet}: wordnet/{name} cannot be read: {error}") from error
