"""Captions -> a model's token ids by the tokenizer that came with it: the files of one of transformers' tokenizers.

What transformers' `AutoTokenizer` makes of a folder decides. If that runs in the `tokenizers` library, as nearly all
do, its rules are taken over as one string: worker processes neither read the files again nor import transformers.
"""

from __future__ import annotations

import html
import string
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mmfoundry.data.text import CaptionTokenizer, ClipTokenizer, clip_tokenizer
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput
from mmfoundry.pipeline.json_file import read_json
from mmfoundry.pipeline.resolve import resolve_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Clean = Literal["whitespace", "lower", "canonicalize"]
VOCABULARY_FILES = ("tokenizer.json", "spiece.model")
_CONFIG = "tokenizer_config.json"
_SIGLIPS = (None, "siglip", "siglip2", "siglip_text_model", "siglip2_text_model")  # model types; None: it is not said


class FolderTokenizer(CaptionTokenizer):
    """A tokenizer of transformers: ids up to the context length, its padding behind (or before) them.

    Every caption has `context_length` ids: what these models read of the padding is part of what they learnt.
    """

    def __init__(
        self,
        folder: str | Path,
        context_length: int,
        clean: Clean | None = None,
        strip_sep_token: bool = False,
        cached_captions: int = 1 << 16,
        known: tuple[str, int | None] | None = None,
    ):
        """Load the tokenizer.

        Args:
            folder: has tokenizer.json or spiece.model, and mostly tokenizer_config.json.
            context_length: tokens a caption is cut or padded to.
            clean: what is done to a caption first, as in open_clip; None: nothing but what the tokenizer does itself.
            strip_sep_token: 0 in place of the token that separates sentences, as CLIPA's text towers read captions.
            cached_captions: how many captions' ids are kept, the least recently used going first.
            known: what `tokenizers` makes of the folder, and the id of that token, if they are known already.
        Raises:
            MissingInput: the folder has no tokenizer, or one for which a package is not installed.
            DamagedInput: its files cannot be read.
            ConfigError: it does not know what to pad with.
        """
        super().__init__(context_length, cached_captions)
        self.folder, self._clean, self._strip = Path(folder), clean, strip_sep_token
        self._slow: PreTrainedTokenizerBase | None = None
        if known is None:
            loaded = load_tokenizer(self.folder)
            self._sep_id: int | None = loaded.sep_token_id
            if loaded.pad_token_id is None:
                raise ConfigError(f"{self.folder / _CONFIG}: pad_token is not set; captions are padded")
            backend = getattr(loaded, "backend_tokenizer", None)
            if backend is None:
                self._slow, self.vocab_size = loaded, len(loaded)
                return
            known = _with_padding(backend.to_str(), loaded, context_length), self._sep_id
        from tokenizers import Tokenizer

        self._known = known
        self._sep_id = known[1]
        self._fast = Tokenizer.from_str(known[0])
        self.vocab_size = self._fast.get_vocab_size()

    def __reduce__(self) -> tuple[Any, ...]:
        known = None if self._slow else self._known
        return FolderTokenizer, (
            self.folder,
            self.context_length,
            self._clean,
            self._strip,
            self._cached_captions,
            known,
        )

    def _encode(self, text: str) -> np.ndarray:
        text = cleaned(text, self._clean)
        if self._slow is None:
            ids = self._fast.encode(text).ids
        else:
            ids = self._slow(text, padding="max_length", truncation=True, max_length=self.context_length)["input_ids"]
        found = np.array(ids, np.int32)
        return np.where(found == self._sep_id, np.int32(0), found) if self._strip else found


@lru_cache(maxsize=8)
def caption_tokenizer(
    name: str | None, context_length: int, clean: Clean | None = None, strip_sep_token: bool = False
) -> ClipTokenizer | FolderTokenizer:
    """The process's tokenizer for a model: made at first use, then shared by all threads.

    Args:
        name: folder or hub id with a tokenizer's files; None: CLIP's byte-pair encoding.
        context_length: tokens of a caption.
        clean: see `FolderTokenizer`.
        strip_sep_token: see `FolderTokenizer`.
    Raises:
        MissingInput: there is no tokenizer of that name.
        DamagedInput: its files cannot be read.
        ConfigError: it does not know what to pad with.
    """
    if name is None:
        return clip_tokenizer(context_length)
    return FolderTokenizer(resolve_tokenizer(name), context_length, clean, strip_sep_token)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """What transformers reads from a folder, without remote code.

    SigLIP's first tokenizer, which takes case and punctuation away, is the one of `spiece.model`, unless
    `tokenizer_config.json` names another class, or `config.json` another model's type, whose class is taken. Where
    there is `tokenizer.json` alone, it is what that file says. So ids do not depend on which packages are installed.

    Raises:
        MissingInput: there is no tokenizer, or one for which a package is not installed.
        DamagedInput: its files cannot be read.
    """
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise MissingInput(f"{folder}: no tokenizer for captions: neither {' nor '.join(VOCABULARY_FILES)}")
    from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

    declare_missing_ops()  # transformers imports torchvision
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, SiglipTokenizer

    kind: Any = AutoTokenizer
    named = _said(folder / _CONFIG, "tokenizer_class")
    if named == "SiglipTokenizer" or (named is None and _said(folder / "config.json", "model_type") in _SIGLIPS):
        kind = SiglipTokenizer if (folder / "spiece.model").is_file() else PreTrainedTokenizerFast
    try:
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(folder, trust_remote_code=False)
    except ImportError as error:
        raise MissingInput(f"{folder}: its tokenizer needs a package: pip install sentencepiece protobuf") from error
    except Exception as error:  # `tokenizers` raises bare Exceptions on files that it cannot read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DamagedInput(f"{folder}: transformers cannot load the tokenizer ({reason[:200]})") from error
    if tokenizer.pad_token_id is None:
        _pad_as_the_file_says(tokenizer)
    return tokenizer


def _said(file: Path, key: str) -> Any:
    """A key of a JSON file; None where the key or the file is not there."""
    return read_json(file).get(key) if file.is_file() else None


def _pad_as_the_file_says(tokenizer: PreTrainedTokenizerBase) -> None:
    """Take the padding token of tokenizer.json, where no config names one."""
    padding = getattr(getattr(tokenizer, "backend_tokenizer", None), "padding", None)
    if padding is not None:
        tokenizer.pad_token = padding["pad_token"]


def _with_padding(rules: str, loaded: PreTrainedTokenizerBase, length: int) -> str:
    """A tokenizer's rules with the cut and the padding that transformers adds on each call."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(rules)
    made.enable_truncation(length, direction=loaded.truncation_side)
    made.enable_padding(
        direction=loaded.padding_side, pad_id=loaded.pad_token_id, pad_token=str(loaded.pad_token), length=length
    )
    return made.to_str()


def cleaned(text: str, clean: Clean | None) -> str:
    """A caption as open_clip's `HFTokenizer` gives it to its tokenizer.

    All three mend broken Unicode and HTML escapes (twice, as they come) and make runs of white space one space.
    `canonicalize` is big_vision's rule: underscores to spaces, no ASCII punctuation, lower case.
    """
    if clean is None:
        return text
    import ftfy  # slow to import, and most models do without

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if clean == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION)
    text = " ".join(text.split())
    return text if clean == "whitespace" else text.lower()


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
