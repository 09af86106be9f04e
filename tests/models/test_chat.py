"""models/chat.py: our own rendering and the released template write the same text."""

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mmfoundry.models.chat import IMAGE, ChatFormat, ImageFormat

TURNS: list[dict[str, str]] = [
    {"role": "system", "content": "be {brief}"},
    {"role": "user", "content": f"{IMAGE}What's  this?\n"},
    {"role": "assistant", "content": "a \\dog"},
    {"role": "user", "content": "sure?"},
]
ODD = ChatFormat(user_prefix="Q'\n{{x}} ", user_suffix="", assistant_prefix="A\\n", assistant_end="</s>")


@pytest.mark.parametrize("chat", [ChatFormat(), ODD])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_template_renders_the_same(chat: ChatFormat, count: int) -> None:
    turns = TURNS[:count]
    ours = "".join(text for text, _ in chat.pieces(turns))
    asked = turns[-1]["role"] == "user"
    for shape in (turns, [part_by_part(turn) for turn in turns]):
        rendered, _ = render_jinja_template([shape], chat_template=chat.jinja(), add_generation_prompt=asked)
        assert rendered[0] == ours


def part_by_part(turn: dict[str, str]) -> dict[str, Any]:
    """The turn as transformers' processors have it: a list of parts."""
    before, image, after = turn["content"].partition(IMAGE)
    parts: list[dict[str, str]] = [{"type": "text", "text": before}]
    parts += [{"type": "image"}, {"type": "text", "text": after}] if image else []
    return {"role": turn["role"], "content": parts}


def test_only_answers_are_learnt() -> None:
    assert [text for text, learnt in ChatFormat().pieces(TURNS) if learnt] == ["a \\dog<|im_end|>"]


@pytest.mark.parametrize(
    ("turn", "message"),
    [({"role": "tool", "content": "x"}, "role 'tool'"), ({"role": "user", "content": ["x"]}, "should be text")],
)
def test_what_is_no_turn(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatFormat().pieces([turn])


def test_picture() -> None:
    image = ImageFormat(patch_token="<p>", start="[", tile_tags=["a:", "b:"], whole_tag="all:", end="]")
    assert image.text(3, 2) == "[a:<p><p>b:<p><p>all:<p><p>]"
    assert image.text(1, 1) == "[all:<p>]"
    with pytest.raises(ValueError, match="3 tiles, but only 2 tile_tags"):
        image.text(4, 1)
