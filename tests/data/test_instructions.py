"""data/instructions.py: what is learnt, what sees what, and that a question is written as it will be asked."""

from typing import Any

import numpy as np
import pytest
import torch

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.instructions import IGNORED, InstructionEncoder, collate
from mmfoundry.data.sample import Sample
from mmfoundry.models.chat import IMAGE
from mmfoundry.models.vlm_text import VlmText
from mmfoundry.stages.instruct import tiles_of
from tests.models.tiny_vlm import picture, tiny_vlm

MODEL, TEXT = tiny_vlm()
RNG = np.random.default_rng


def encoder(**changes: Any) -> InstructionEncoder:
    text: VlmText = TEXT
    values: dict[str, Any] = {
        "cut_tiles": tiles_of(MODEL),
        "pieces": text.settings.chat.pieces,
        "encode": text.encode,
        "image_text": text.image_text,
        "placeholder": IMAGE,
        "patch_id": text.patch_id,
    }
    return InstructionEncoder(**values | changes)


def sample(**changes: Any) -> Sample:
    questions = [
        {"type": "count", "question": "How many pictures are there?", "answer": "two"},
        {"type": "what", "question": "What is in the top left?", "answer": "the apple"},
        {"type": "what", "question": "What is in the bottom right?", "answers": ["dog", "the dog"]},
    ]
    values: dict[str, Any] = {"key": "a", "image": picture(0), "meta": {"questions": questions}}
    return Sample(**values | changes)


def text_of(ids: torch.Tensor) -> str:
    return TEXT.tokenizer.decode(ids.tolist())


def test_only_answers_are_learnt() -> None:
    row = encoder()(sample(), RNG(0))
    learnt = row["input_ids"][row["labels"] != IGNORED]
    assert torch.equal(learnt, row["labels"][row["labels"] != IGNORED])
    assert sorted(text_of(learnt).split("<|im_end|>")) == ["", "dog", "the apple", "two"]
    assert row["tiles"].shape == (5, 3, 16, 16)


def test_each_question_is_written_as_it_will_be_asked() -> None:
    row = encoder()(sample(), RNG(0))
    common = row["input_ids"][row["branches"] == 0].tolist()
    asked = {}
    for branch in (1, 2, 3):
        ids = row["input_ids"][row["branches"] == branch]
        question = next(q["question"] for q in sample().meta["questions"] if q["question"] in text_of(ids))
        before, after = TEXT.prompt(question, 5)
        assert common == before
        assert ids.tolist()[: len(after)] == after
        positions = row["position_ids"][row["branches"] == branch].tolist()
        assert positions == list(range(len(common), len(common) + len(ids)))
        asked[question] = branch
    assert len(asked) == 3


def test_packed_questions_are_as_if_each_were_alone() -> None:
    """Loss and logits of the packed batch equal those of every question in a sequence of its own, unpadded."""
    rows = [encoder()(sample(), RNG(0)), encoder(max_questions=1)(sample(image=picture(1)), RNG(1))]
    batch = collate(rows)
    with torch.no_grad():
        packed = MODEL(batch)
    alone = []
    for number, row in enumerate(rows):
        common = row["branches"] == 0
        for branch in range(1, int(row["branches"].max()) + 1):
            part = common | (row["branches"] == branch)
            one = {name: row[name][part][None] for name in ("input_ids", "labels")}
            one["tiles"] = batch["tiles"][5 * number : 5 * number + 5]
            with torch.no_grad():
                alone.append(MODEL(one))
    torch.testing.assert_close(packed.logits_sV, torch.cat([each.logits_sV for each in alone]), rtol=1e-4, atol=1e-4)
    assert torch.equal(packed.target_s, torch.cat([each.target_s for each in alone]))


def test_types_are_drawn_by_weight() -> None:
    """Two `what` and one `count`: each type as often as it weighs, not as often as it comes."""
    encode = encoder(types={"count": 3.0, "what": 1.0, "where": 5.0}, max_questions=1)
    drawn = [encode(sample(), RNG(seed)) for seed in range(400)]
    counted = sum("How many" in text_of(row["input_ids"]) for row in drawn)
    assert 260 < counted < 340
    with pytest.raises(UnreadableSample, match="no question of the wanted types"):
        encoder(types={"where": 1.0})(sample(), RNG(0))


def test_a_conversation_is_one_branch() -> None:
    turns = [
        {"role": "system", "content": "the dog"},
        {"role": "user", "content": "<image>\nWhere is the dog?"},
        {"role": "assistant", "content": "top left"},
        {"role": "user", "content": "Is there a dog?"},
        {"role": "assistant", "content": "yes"},
    ]
    row = encoder()(sample(meta={}, messages=turns), RNG(0))
    assert text_of(row["labels"][row["labels"] != IGNORED]) == "top left<|im_end|>yes<|im_end|>"
    assert set(row["branches"].tolist()) == {0, 1}
    assert row["position_ids"].tolist() == list(range(len(row["input_ids"])))
    assert "<image>" not in text_of(row["input_ids"])


def test_answers_before_the_picture_are_learnt_too() -> None:
    turns = [
        {"role": "user", "content": "Where is the dog?"},
        {"role": "assistant", "content": "top left"},
        {"role": "user", "content": "<image>Is there a dog?"},
        {"role": "assistant", "content": "yes"},
    ]
    row = encoder()(sample(meta={}, messages=turns), RNG(0))
    assert text_of(row["labels"][row["labels"] != IGNORED]) == "top left<|im_end|>yes<|im_end|>"


def test_too_long() -> None:
    whole = encoder()(sample(), RNG(0))
    limit = len(whole["input_ids"]) - 1
    shorter = encoder(max_tokens=limit)(sample(), RNG(0))
    assert int(shorter["branches"].max()) == 2
    assert len(shorter["input_ids"]) <= limit
    with pytest.raises(UnreadableSample, match="no answer to learn"):
        encoder(max_tokens=len(TEXT.prompt("", 5)[0]) + 2)(sample(), RNG(0))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"meta": {}}, "no question"),
        ({"meta": {"questions": [{"type": "what"}]}}, "lacks a part"),
        ({"meta": {}, "messages": [{"role": "assistant", "content": "yes"}]}, "not a conversation"),
        ({"meta": {}, "messages": [{"role": "user", "content": ["yes"]}]}, "not a conversation"),
        ({"meta": {}, "messages": [{"role": "tool", "content": "x"}, {"role": "user", "content": "x"}]}, "not a conv"),
        ({"meta": {}, "messages": [{"role": "user", "content": "<image><image>"}]}, "not a conversation"),
        ({"meta": {}, "messages": [{"role": "user", "content": "Where?"}]}, "no answer to learn"),
    ],
)
def test_what_is_no_conversation(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnreadableSample, match=reason):
        encoder()(sample(**changes), RNG(0))
