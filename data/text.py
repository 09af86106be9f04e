"""Captions -> CLIP's token ids, and which of a sample's captions is used."""

from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.pipeline.errors import ConfigError

if TYPE_CHECKING:
    from mmfoundry.data.clip_words import ClipWords
    from mmfoundry.data.sample import Sample

CONTEXT_LENGTH = 77  # tokens, of OpenAI's CLIP
_load_lock = Lock()


class CaptionTokenizer:
    """What turns captions into ids.

    A caption's ids are remembered: corpora repeat their captions every epoch, and splitting one costs more than
    decoding a small picture.

    Attributes:
        context_length: tokens a caption is cut or padded to.
        vocab_size: number of ids.
    """

    vocab_size: int

    def __init__(self, context_length: int, cached_captions: int):
        """Remember the ids of so many captions, the least recently used going first."""
        self.context_length = context_length
        self._cached = lru_cache(maxsize=cached_captions)(self._read_only)
        self._cached_captions = cached_captions

    def encode(self, text: str) -> np.ndarray:
        """Ids of one caption: int32 (at most context_length,), read-only; padded only if its padding is read."""
        return self._cached(text)

    def _read_only(self, text: str) -> np.ndarray:
        ids = self._encode(text)
        ids.flags.writeable = False
        return ids

    def _encode(self, text: str) -> np.ndarray:
        raise NotImplementedError

    def __call__(self, texts: str | Sequence[str]) -> np.ndarray:
        """Ids of captions: int32 (n, context_length), 0 behind what `encode` gives; one string counts as n = 1."""
        rows = [texts] if isinstance(texts, str) else texts
        ids = np.zeros((len(rows), self.context_length), np.int32)
        for row, text in enumerate(rows):
            encoded = self._cached(text)
            ids[row, : len(encoded)] = encoded
        return ids


class ClipTokenizer(CaptionTokenizer):
    """CLIP's byte-pair encoding (open_clip's `SimpleTokenizer`): 49,408 ids, lower case, start and end marked."""

    def __init__(self, context_length: int = CONTEXT_LENGTH, cached_captions: int = 1 << 16):
        """Load the vocabulary.

        Args:
            context_length: tokens a caption is cut or padded to, at least 2.
            cached_captions: how many captions' ids are kept, the least recently used going first.
        Raises:
            ConfigError: no room for start and end.
        """
        if context_length < 2:
            raise ConfigError(
                f"a context length of {context_length} tokens has no room for start and end; use 2 or more"
            )
        super().__init__(context_length, cached_captions)
        self._base = _words()
        self.vocab_size = int(self._base.vocab_size)  # the last id marks the end

    def __reduce__(self) -> tuple[Any, ...]:
        return ClipTokenizer, (self.context_length, self._cached_captions)  # another process loads it for itself

    def _encode(self, text: str) -> np.ndarray:
        base = self._base
        return np.array([base.sot_token_id, *base.encode(text)[: self.context_length - 2], base.eot_token_id], np.int32)


@lru_cache(maxsize=8)
def clip_tokenizer(context_length: int = CONTEXT_LENGTH) -> ClipTokenizer:
    """The process's tokenizer for a context length: made at first use, then shared by all threads."""
    return ClipTokenizer(context_length)


def tokenize(texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH) -> np.ndarray:
    """Ids of captions as open_clip's `tokenize` gives them.

    Args:
        texts: one caption or several.
        context_length: tokens; longer captions are cut, their last id being the end mark.
    Returns:
        int32 (n, context_length), 0 behind the end mark.
    """
    return clip_tokenizer(context_length)(texts)


def choose_caption(sample: "Sample", rng: np.random.Generator) -> str:
    """One of the sample's captions, each as likely; drawn from the sample's own generator.

    Raises:
        UnreadableSample: it has none ("no caption").
    """
    if not sample.text:
        raise UnreadableSample("no caption")
    return sample.text[int(rng.integers(len(sample.text)))]


@lru_cache(maxsize=1)
def _load_words() -> "ClipWords":
    from mmfoundry.data.clip_words import ClipWords  # here, as reading text needs no vocabulary

    return ClipWords()


def _words() -> "ClipWords":
    with _load_lock:  # two worker threads that start at once would load the vocabulary twice
        return _load_words()
