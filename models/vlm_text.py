"""The text side of a vision-language model: its tokenizer, and how prompts become ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import normalizers
from transformers import PreTrainedTokenizerBase

from mmfoundry.models.chat import IMAGE, TILE
from mmfoundry.models.vlm import VlmSettings
from mmfoundry.pipeline.errors import ConfigError


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, settings: VlmSettings) -> bool:
    """Teach a language model's tokenizer the placeholder, the tiles' tags and the chat template.

    transformers' processor can only write `<tile>_1` before the first tile. A normaliser in the tokenizer turns that
    into the tag's words, so that the released folder needs no code of ours.

    Args:
        tokenizer: changed in place.
        settings: of the model.

    Returns:
        Whether the placeholder was added as a new id, past those that the model has vectors for.

    Raises:
        ConfigError: the tokenizer is a slow one, or the end of an answer is not one token.
    """
    if not tokenizer.is_fast:
        raise ConfigError(f"{type(tokenizer).__name__}: only tokenizers of the `tokenizers` library can be used")
    added = tokenizer.add_special_tokens(
        {"additional_special_tokens": [settings.image.patch_token]}, replace_extra_special_tokens=False
    )
    backend = tokenizer.backend_tokenizer
    # From the last, because <tile>_1 begins <tile>_12 as well.
    tags = reversed(list(enumerate(settings.image.tile_tags, start=1)))
    replaced = [normalizers.Replace(f"{TILE}_{number}", tag) for number, tag in tags]
    backend.normalizer = normalizers.Sequence([*replaced, *([backend.normalizer] if backend.normalizer else [])])
    tokenizer.chat_template = settings.chat.jinja()
    tokenizer.padding_side = "left"
    ids = tokenizer(settings.chat.assistant_end, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ConfigError(f"chat.assistant_end {settings.chat.assistant_end!r} should be one token, not {len(ids)}")
    tokenizer.eos_token = settings.chat.assistant_end
    if tokenizer.pad_token is None:
        tokenizer.pad_token = settings.chat.assistant_end
    return bool(added)


@dataclass(frozen=True)
class VlmText:
    """Text to ids for one vision-language model.

    Attributes:
        tokenizer: as `prepare_tokenizer` left it.
        settings: of the model.
        tokens_per_tile: of the model.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: VlmSettings
    tokens_per_tile: int

    @property
    def patch_id(self) -> int:
        """Id of the placeholder of one image token."""
        return self.tokenizer.convert_tokens_to_ids(self.settings.image.patch_token)  # type: ignore[return-value]

    @property
    def end_id(self) -> int:
        """Id of the token that ends an answer."""
        return self.tokenizer.convert_tokens_to_ids(self.settings.chat.assistant_end)  # type: ignore[return-value]

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, and the characters that each came from."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def image_text(self, num_tiles: int) -> str:
        """The text that a picture of so many tiles becomes."""
        return self.settings.image.text(num_tiles, self.tokens_per_tile)

    def prompt(self, question: str, num_tiles: int) -> tuple[list[int], list[int]]:
        """Ids that ask a question about a picture, in two parts.

        Returns:
            what is the same for every question, up to and with the last placeholder; and the rest.
        """
        message = {"role": "user", "content": IMAGE + question}
        text = "".join(piece for piece, _ in self.settings.chat.pieces([message]))
        ids, _ = self.encode(text.replace(IMAGE, self.image_text(num_tiles), 1))
        patch_id = self.patch_id
        cut = len(ids) - ids[::-1].index(patch_id)
        return ids[:cut], ids[cut:]

    def decode(self, ids: torch.Tensor | list[int]) -> str:
        """The text of an answer's ids, without special tokens and space around it."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
