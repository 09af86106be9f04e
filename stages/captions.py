"""Which tokenizer reads a CLIP's captions."""

from __future__ import annotations

from mmfoundry.data.caption_tokenizer import FolderTokenizer, caption_tokenizer
from mmfoundry.data.text import ClipTokenizer
from mmfoundry.models.open_clip_model import CaptionSide
from mmfoundry.models.text import TextConfig


def tokenizer_of(text: TextConfig | CaptionSide) -> ClipTokenizer | FolderTokenizer:
    """The tokenizer of a text tower, shared by all who ask for the same.

    Raises:
        MissingInput: its folder has none, or the hub cannot be reached.
        DamagedInput: its files cannot be read.
        ConfigError: it does not know what to pad with.
    """
    asked = text.tokenizer_kwargs
    if asked is None:
        return caption_tokenizer(text.hf_tokenizer_name, text.context_length)
    return caption_tokenizer(text.hf_tokenizer_name, text.context_length, asked.clean, asked.strip_sep_token)
