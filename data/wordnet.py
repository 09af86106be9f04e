"""WordNet's index of words, and the first meaning of a word as NLTK finds it.

WordNet (Miller 1995) comes as Debian's package `wordnet-base` (/usr/share/wordnet) or by NLTK's downloader
(corpora/wordnet, a folder or a zip file); both hold the same files, of which the indexes and lists of exceptions are
read here. A meaning is a synset, told by its offset in a data file; ImageNet names its classes by those of nouns.
"""

import importlib.util
import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mmfoundry.pipeline.errors import DamagedInput, MissingInput

PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
# endings and what the lemma has in their place (WordNet's morphy, man page morphy(7WN))
_ENDINGS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "noun": (
        ("s", ""),
        ("ses", "s"),
        ("ves", "f"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    ),
    "verb": (
        ("s", ""),
        ("ies", "y"),
        ("es", "e"),
        ("es", ""),
        ("ed", "e"),
        ("ed", ""),
        ("ing", "e"),
        ("ing", ""),
    ),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}
_ENDS = {part: tuple(ending for ending, _ in rules) for part, rules in _ENDINGS.items()}


@dataclass(frozen=True)
class WordNet:
    """The words of WordNet.

    Attributes:
        first: by part of speech and lemma, the offset of its most frequent synset.
        exceptions: by part of speech and inflected form, its lemmas.
    """

    first: Mapping[str, Mapping[str, int]]
    exceptions: Mapping[str, Mapping[str, tuple[str, ...]]]

    def first_synset(self, word: str) -> int | None:
        """Offset of the first synset that NLTK's `synsets(word)` lists; None for a word that WordNet does not know.

        Nouns come before verbs, adjectives and adverbs; of a part of speech the word itself before the lemmas that it
        may be a form of. The offset does not say which part of speech it belongs to.
        """
        word = word.lower()
        for part in PARTS_OF_SPEECH:
            known = self.first[part]
            if word in known:
                return known[word]
            # most words are no form of anything
            if word in self.exceptions[part] or word.endswith(_ENDS[part]):
                form = next(filter(known.__contains__, self._forms(word, part)), None)
                if form is not None:
                    return known[form]
        return None

    def _forms(self, word: str, part: str) -> Iterator[str]:
        """What a word may be a form of, as NLTK 3.8.1 does it, which is what DataComp asks for.

        Exceptions stand for the rules. The rules are applied again to what they gave as long as no form is known;
        NLTK from 3.9 on applies them once.
        """
        if word in self.exceptions[part]:
            yield from self.exceptions[part][word]
            return
        forms = [word]
        while forms:
            forms = [
                form[: -len(ending)] + lemma
                for form in forms
                for ending, lemma in _ENDINGS[part]
                if form.endswith(ending)
            ]
            yield from forms


def load_wordnet(folder: Path | None = None) -> WordNet:
    """Read WordNet's indexes and exceptions.

    Args:
        folder: with index.noun and the others, or a zip file with such a folder; None looks where Debian, NLTK and
            WordNet itself put it, see `wordnet_places`.
    Raises:
        MissingInput: it is not there.
        DamagedInput: a line is not an entry.
    """
    found = find_wordnet(folder)
    lines = _lines_in_zip(found) if found.suffix == ".zip" else _lines_in_folder(found)
    first = {part: dict(_entries(lines(f"index.{part}"), f"{found}: index.{part}")) for part in PARTS_OF_SPEECH}
    exceptions = {
        part: {terms[0]: tuple(terms[1:]) for terms in map(str.split, lines(f"{part}.exc")) if terms}
        for part in PARTS_OF_SPEECH
    }
    return WordNet(first, exceptions)


def find_wordnet(folder: Path | None = None) -> Path:
    """The folder or zip file in which WordNet lies.

    Raises:
        MissingInput: nowhere; says where it was looked for.
    """
    places = wordnet_places() if folder is None else [folder]
    for place in places:
        if (place / "index.noun").is_file() or (place.suffix == ".zip" and place.is_file()):
            return place
    where = "in the usual places" if folder is None else f"in {folder}"
    raise MissingInput(
        f"WordNet (index.noun) is not {where}; get it by `apt-get install wordnet-base` or `python -m nltk.downloader "
        f"wordnet`, or name its folder in WNSEARCHDIR or text_based's parameter wordnet (looked in "
        f"{', '.join(map(str, places))})"
    )


def wordnet_places() -> list[Path]:
    """Where WordNet is looked for: its own variables WNSEARCHDIR and WNHOME, NLTK's folders, Debian's."""
    environment = os.environ
    own = [Path(environment["WNSEARCHDIR"])] if "WNSEARCHDIR" in environment else []
    own += [Path(environment["WNHOME"]) / "dict"] if "WNHOME" in environment else []
    nltk = [Path(one) for one in environment.get("NLTK_DATA", "").split(os.pathsep) if one]
    nltk += [Path.home() / "nltk_data", Path(sys.prefix) / "nltk_data"]
    nltk += [Path(one) / "nltk_data" for one in ("/usr/share", "/usr/local/share", "/usr/lib", "/usr/local/lib")]
    return [
        *own,
        *(folder / "corpora" / name for folder in nltk for name in ("wordnet", "wordnet.zip")),
        Path("/usr/share/wordnet"),
    ]


def imagenet21k_file() -> Path:
    """The list of ImageNet-21k's synsets (21,841, the fall 2011 release) that timm's package carries.

    Raises:
        MissingInput: timm is not installed, or has no such list any more.
    """
    package = importlib.util.find_spec("timm")  # found, not imported: that takes seconds
    for folder in (package.submodule_search_locations or []) if package else []:
        path = Path(folder) / "data" / "_info" / "imagenet22k_synsets.txt"
        if path.is_file():
            return path
    raise MissingInput("timm's list of ImageNet-21k synsets is not there: pip install timm, or give your own list")


def read_synset_ids(path: Path) -> frozenset[int]:
    """Offsets from a text file of synset ids, one a line: `n01440764` is 1440764.

    Raises:
        MissingInput: there is no such file.
        DamagedInput: a line is not an id.
    """
    if not path.is_file():
        raise MissingInput(f"there is no {path}")
    lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    for number, line in enumerate(lines, start=1):
        if line and not (line[0].isalpha() and line[1:].isdecimal()):
            raise DamagedInput(f"{path}: line {number} is {line[:40]!r}, not a synset id such as n01440764")
    return frozenset(int(line[1:]) for line in lines if line)


def _entries(lines: Iterator[str], where: str) -> Iterator[tuple[str, int]]:
    """Lemma and first synset's offset of each line of an index file (format: man page wndb(5WN))."""
    for line in lines:
        if not line or line.startswith(" "):  # the licence
            continue
        try:
            lemma, _, count, rest = line.split(maxsplit=3)
            if int(count):
                yield lemma, int(rest.rsplit(maxsplit=int(count))[1])
        except (IndexError, ValueError) as error:
            raise DamagedInput(f"{where}: {line[:60]!r} is not an entry") from error


def _lines_in_folder(folder: Path) -> Callable[[str], Iterator[str]]:
    def lines(name: str) -> Iterator[str]:
        try:
            yield from (folder / name).read_text("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DamagedInput(f"{folder / name} cannot be read: {error}") from error

    return lines


def _lines_in_zip(path: Path) -> Callable[[str], Iterator[str]]:
    def lines(name: str) -> Iterator[str]:
        try:
            with zipfile.ZipFile(path) as archive:
                yield from archive.read(f"wordnet/{name}").decode("utf-8").split("\n")
        except (OSError, KeyError, zipfile.BadZipFile, UnicodeDecodeError) as error:
            raise DamagedInput(f"{path}: wordnet/{name} cannot be read: {error}") from error

    return lines
