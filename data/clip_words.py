"""CLIP's byte-pair encoding from the vocabulary that open_clip ships, without importing open_clip and torch.

A worker process that tokenises captions would otherwise hold both: seconds to start and some 300 MB each. The ids are
those of open_clip's `SimpleTokenizer`, by test.
"""

from __future__ import annotations

import html
import importlib.util
import zlib
from functools import lru_cache
from pathlib import Path

import regex
from tokenizers.models import BPE

from mmfoundry.pipeline.errors import MissingInput

_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 49152 - 256 - 2  # of the lines in the file
_CHUNK_BYTES = 1 << 19
_KNOWN_WORDS, _LONG_WORD = 1 << 16, 32  # about 10 MB
_START, _END = "<start_of_text>", "<end_of_text>"
# OpenAI's: the marks, English contractions, runs of letters, single digits, runs of anything else
_WORDS = regex.compile(
    rf"{_START}|{_END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
)


class ClipWords:
    """Text to CLIP's ids.

    Attributes:
        vocab_size: number of ids.
        sot_token_id: id that marks the start.
        eot_token_id: id that marks the end; the highest.
    """

    def __init__(self) -> None:
        """Load the vocabulary.

        Raises:
            MissingInput: open_clip is not installed, or lacks it.
        """
        lines = _first_lines(_vocabulary_file().read_bytes(), _MERGES + 1)
        merges = [(first, second) for first, second in map(str.split, lines[1:])]
        letters = list(_letters().values())
        tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), _START, _END]
        self._ids = {token: number for number, token in enumerate(tokens)}
        self._bpe = BPE(vocab=self._ids, merges=merges, end_of_word_suffix="</w>")
        self._known: dict[str, list[int]] = {}  # ids of words met before: most words of a corpus are few
        self.vocab_size = len(tokens)
        self.sot_token_id, self.eot_token_id = self._ids[_START], self._ids[_END]

    def encode(self, text: str) -> list[int]:
        """Ids of a text without start and end mark: cleaned, in lower case, word by word."""
        ids: list[int] = []
        for word in _WORDS.findall(clean(text)):
            ids += self._known.get(word) or self._of_word(word)
        return ids

    def _of_word(self, word: str) -> list[int]:
        if word in (_START, _END):
            return [self._ids[word]]
        letters = _letters()
        spelt = "".join(letters[byte] for byte in word.encode("utf-8"))
        ids = [token.id for token in self._bpe.tokenize(spelt)]
        if len(word) <= _LONG_WORD and len(self._known) < _KNOWN_WORDS:
            self._known[word] = ids
        return ids


def clean(text: str) -> str:
    """Mend broken Unicode and HTML escapes (twice, as they come), single spaces, lower case."""
    # of plain ASCII there is nothing to mend, and looking costs half of the work
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy  # slow to import, and many corpora never come here

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@lru_cache(maxsize=1)
def _letters() -> dict[int, str]:
    """A visible character for every byte (GPT-2's table), in the order of the vocabulary's first 256 ids."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + number) for number, byte in enumerate(hidden)}


def _first_lines(packed: bytes, count: int) -> list[str]:
    """The first lines of a gzip file, which goes on for five times as many here; the rest is not unpacked."""
    unpack, text = zlib.decompressobj(wbits=31), b""  # 31: gzip
    while text.count(b"\n") < count:
        text += unpack.decompress(packed, _CHUNK_BYTES)
        packed = unpack.unconsumed_tail
    return b"".join(text.splitlines(keepends=True)[:count]).decode("utf-8").split("\n")[:count]


def _vocabulary_file() -> Path:
    spec = importlib.util.find_spec("open_clip")  # finds a package without importing it
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / _VOCABULARY).is_file():
            return Path(folder) / _VOCABULARY
    raise MissingInput(f"open_clip's {_VOCABULARY} is not there: pip install open_clip_torch")
