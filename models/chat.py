"""How a conversation about a picture is written as text: the turns, and the places that the picture's tiles take.

The same strings make the released chat template and processor, so that training and every later user write alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from mmfoundry.pipeline.config import Config

IGNORED = -100  # the label of a position that is not supervised
IMAGE = "<image>"  # in rendered text: where the picture goes
# The released processor can only write a tag as its name, an underscore and a number. Its tokenizer turns this one
# into words (see `interop.transformers_vlm`).
TILE = "<tile>"


class ChatFormat(Config):
    """What stands around each turn of a conversation. The defaults are ChatML, without a system prompt."""

    user_prefix: str = Field("<|im_start|>user\n", description="before a user's turn")
    user_suffix: str = Field("<|im_end|>\n", description="after a user's turn")
    assistant_prefix: str = Field("<|im_start|>assistant\n", description="before an answer")
    assistant_end: str = Field(
        "<|im_end|>", min_length=1, description="ends an answer, and is learnt; one token of the language model"
    )
    assistant_suffix: str = Field("\n", description="between the end of an answer and the next turn")
    system_prefix: str = Field("<|im_start|>system\n", description="before a system turn")
    system_suffix: str = Field("<|im_end|>\n", description="after a system turn")

    def pieces(self, messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
        """The conversation as consecutive pieces of text, each with whether the model learns to say it.

        Args:
            messages: turns `{"role": "user" | "assistant" | "system", "content": str}`. A last turn of the user is
                followed by the start of the answer that the model is to give.

        Raises:
            ValueError: an unknown role, or content that is not text.
        """
        pieces: list[tuple[str, bool]] = []
        for turn in messages:
            role, content = turn.get("role"), turn.get("content")
            if not isinstance(content, str):
                raise ValueError(f"content of a {role} turn should be text, not {type(content).__name__}")
            if role == "user":
                pieces.append((f"{self.user_prefix}{content}{self.user_suffix}", False))
            elif role == "assistant":
                pieces.append((self.assistant_prefix, False))
                pieces.append((f"{content}{self.assistant_end}", True))
                pieces.append((self.assistant_suffix, False))
            elif role == "system":
                pieces.append((f"{self.system_prefix}{content}{self.system_suffix}", False))
            else:
                raise ValueError(f"role {role!r} is not one of user, assistant, system")
        if messages and messages[-1].get("role") == "user":
            pieces.append((self.assistant_prefix, False))
        return [(text, learnt) for text, learnt in pieces if text]

    def jinja(self) -> str:
        """The chat template that transformers applies: content is text, or a list of text and image parts."""
        quoted = {name: _quote(value) for name, value in self.model_dump().items()}
        return (
            "{%- macro body(content) -%}"
            "{%- if content is string -%}{{- content -}}{%- else -%}{%- for part in content -%}"
            f"{{%- if part['type'] == 'image' -%}}{{{{- {_quote(IMAGE)} -}}}}"
            "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
            "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
            "{%- for message in messages -%}"
            "{%- if message['role'] == 'user' -%}"
            f"{{{{- {quoted['user_prefix']} -}}}}{{{{- body(message['content']) -}}}}"
            f"{{{{- {quoted['user_suffix']} -}}}}"
            "{%- elif message['role'] == 'assistant' -%}"
            f"{{{{- {quoted['assistant_prefix']} -}}}}{{{{- body(message['content']) -}}}}"
            f"{{{{- {quoted['assistant_end']} -}}}}{{{{- {quoted['assistant_suffix']} -}}}}"
            "{%- elif message['role'] == 'system' -%}"
            f"{{{{- {quoted['system_prefix']} -}}}}{{{{- body(message['content']) -}}}}"
            f"{{{{- {quoted['system_suffix']} -}}}}"
            "{%- else -%}{{- raise_exception('unknown role ' ~ message['role']) -}}{%- endif -%}"
            "{%- endfor -%}"
            f"{{%- if add_generation_prompt -%}}{{{{- {quoted['assistant_prefix']} -}}}}{{%- endif -%}}"
        )


class ImageFormat(Config):
    """The text that a picture becomes: each tile's tag and placeholders, then the whole picture's."""

    patch_token: str = Field(
        "<empty_output>", min_length=1, description="the placeholder of one image token; added where the model lacks it"
    )
    start: str = Field("", description="before the picture")
    tile_tags: list[str] = Field(
        default_factory=lambda: [f"tile {number}:" for number in range(1, 13)],
        description="what stands before each tile, in reading order; at least as many as there may be tiles",
    )
    whole_tag: str = Field("whole:", description="what stands before the view of the whole picture")
    end: str = Field("", description="after the picture")

    @model_validator(mode="after")
    def _tags_fit(self) -> ImageFormat:
        for name in ("start", "whole_tag", "end"):
            if self.patch_token in getattr(self, name) or TILE in getattr(self, name):
                raise ValueError(f"{name} must not hold {self.patch_token} or {TILE}")
        if any(self.patch_token in tag or TILE in tag or not tag for tag in self.tile_tags):
            raise ValueError(f"a tile's tag must not be empty, nor hold {self.patch_token} or {TILE}")
        return self

    def text(self, num_tiles: int, tokens_per_tile: int) -> str:
        """What a picture becomes.

        Args:
            num_tiles: pictures that the vision tower sees for it: 1 (the whole), or tiles and then the whole.
            tokens_per_tile: placeholders for each.

        Raises:
            ValueError: there are fewer tags than tiles.
        """
        if num_tiles - 1 > len(self.tile_tags):
            raise ValueError(f"{num_tiles - 1} tiles, but only {len(self.tile_tags)} tile_tags")
        patches = self.patch_token * tokens_per_tile
        tiles = "".join(tag + patches for tag in self.tile_tags[: num_tiles - 1])
        return f"{self.start}{tiles}{self.whole_tag}{patches}{self.end}"


def _quote(text: str) -> str:
    """A string literal of Jinja."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
