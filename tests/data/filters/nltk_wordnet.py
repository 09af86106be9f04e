"""NLTK's WordNet over any folder of WordNet's files: NLTK itself reads only one that it downloaded."""

import shutil
from pathlib import Path
from typing import Any


def nltk_reader(folder: Path) -> Any:
    """NLTK's reader.

    Args:
        folder: with index, data and exception files and `lexnames`; see `copy_for_nltk`.
    Raises:
        ImportError: NLTK is not installed.
    """
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Reader(WordNetCorpusReader):
        def map_wn(self, version: str = "wordnet") -> None:
            """Of numbers in another version of WordNet, which wants the downloaded one; for other languages only."""

    nltk.data.path.append(str(folder))  # it opens files nowhere else
    return Reader(str(folder), _NoOtherLanguages())


class _NoOtherLanguages:
    """In place of the reader of other languages' WordNets; only asked whether it is there."""


def copy_for_nltk(wordnet: Path, folder: Path) -> Path:
    """Copy WordNet's files to where NLTK may read them, with the list `lexnames`, which Debian leaves out."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in wordnet.iterdir():
        shutil.copyfile(path, folder / path.name)
    if not (folder / "lexnames").exists():
        (folder / "lexnames").write_text("".join(f"{number:02d}\tsome.thing\t1\n" for number in range(45)))
    return folder
