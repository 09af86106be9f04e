"""Which entries of a list stand in a caption, by one pass over the caption (Aho and Corasick 1975).

A text is matched as MetaCLIP does it: punctuation marks get a space on both sides, the whole text as well, and an entry
counts where it stands between spaces, with the same capital letters. Entries of the second version that begin or end
in a script without spaces, or in a punctuation mark, need no space there.
"""

import string
from collections.abc import Sequence
from typing import Any

import polars as pl

from mmfoundry.pipeline.errors import MissingInput

_SPACED = str.maketrans({**{mark: f" {mark} " for mark in ",.;:?!`"}, "\t": " ", "\n": " ", "\r": " "})
_MARKS = frozenset(string.punctuation + "，。、；：？！“”‘’（）【】《》〈〉「」『』～—")
# Chinese and Japanese ideographs and radicals; Thai, Lao, Tibetan, Burmese, Khmer
_UNSPACED = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2CEAF),
    (0x2CEB0, 0x2EBEF),
    (0xF900, 0xFAFF),
    (0x2E80, 0x2FDF),
    (0x2FF0, 0x2FFF),
    (0x0E00, 0x0EFF),
    (0x0F00, 0x0FFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
)


class EntryMatcher:
    """Finds the entries of one list in captions."""

    def __init__(self, entries: Sequence[str], unspaced_scripts: bool = False) -> None:
        """Build the automaton: some seconds and 200 MB for 500,000 entries.

        Args:
            entries: none of them empty; a caption's matches are numbers in this list.
            unspaced_scripts: whether entries in scripts without spaces match inside of words (MetaCLIP 2).
        Raises:
            MissingInput: ahocorasick-rs is not installed.
        """
        library = _library()
        patterns = [spaced_entry(entry) if unspaced_scripts else f" {entry} " for entry in entries]
        self._find = library.AhoCorasick(
            patterns, store_patterns=False, implementation=library.Implementation.ContiguousNFA
        ).find_matches_as_indexes

    def matches(self, captions: pl.Series) -> pl.Series:
        """The entries in each caption: lists of UInt32, sorted, each entry once; null without a caption."""
        found = [
            None
            if caption is None
            else sorted({match[0] for match in self._find(spaced_text(caption), overlapping=True)})
            for caption in captions.to_list()
        ]
        return pl.Series("entries", found, dtype=pl.List(pl.UInt32))


def spaced_text(caption: str) -> str:
    """A caption as it is matched."""
    return f" {caption} ".translate(_SPACED)


def spaced_entry(entry: str) -> str:
    """An entry as it is looked for where scripts without spaces are known (MetaCLIP 2)."""
    before = "" if _needs_no_space(entry[0]) else " "
    after = "" if _needs_no_space(entry[-1]) else " "
    return f"{before}{entry}{after}"


def _needs_no_space(character: str) -> bool:
    code = ord(character)
    return character in _MARKS or any(first <= code <= last for first, last in _UNSPACED)


def _library() -> Any:
    try:
        import ahocorasick_rs
    except ImportError as error:
        raise MissingInput("matching entries needs ahocorasick-rs: pip install 'mmfoundry[filter]'") from error
    return ahocorasick_rs
