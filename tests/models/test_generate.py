"""models/generate.py: shared prefixes, padding and caches change nothing; each question gets its own answer."""

import torch

from mmfoundry.data.tiles import cut_tiles
from mmfoundry.models.generate import answer
from mmfoundry.models.vlm import VisionLanguageModel
from mmfoundry.models.vlm_text import VlmText
from tests.models.tiny_vlm import logits_of, picture, tiny_vlm

QUESTIONS = ["How many pictures are there?", "Is there a dog?", "two", "What is in the top left? the dog the apple"]


def one_by_one(model: VisionLanguageModel, text: VlmText, tiles: torch.Tensor, question: str, limit: int) -> str:
    """Greedy decoding with no cache, no batch and no padding: the whole sequence anew for every token."""
    before, after = text.prompt(question, len(tiles))
    ids, written = before + after, []
    for _ in range(limit):
        with torch.no_grad():
            chosen = int(logits_of(model, torch.tensor([ids]), tiles)[0, -1].argmax())
        if chosen == text.end_id:
            break
        written.append(chosen)
        ids = [*ids, chosen]
    return text.decode(written)


def test_same_as_one_by_one() -> None:
    model, text = tiny_vlm(tiles={"min_tiles": 1, "max_tiles": 4})
    # Squares and a wide one: five tiles, five, and three
    pictures = [
        cut_tiles(picture(0), 16, 1, 4),
        cut_tiles(picture(1), 16, 1, 4),
        cut_tiles(picture(2, 20, 42), 16, 1, 4),
    ]
    assert [len(tiles) for tiles in pictures] == [5, 5, 3]
    asked = [(question, number) for number in (2, 0, 1) for question in QUESTIONS]
    found = answer(model, text, pictures, [q for q, _ in asked], [number for _, number in asked], max_new_tokens=6)
    expected = [one_by_one(model, text, pictures[number], question, 6) for question, number in asked]
    assert found == expected
    assert len(set(found)) > 4  # answers that are all the same would agree whatever is mixed up


def test_stops_at_the_end() -> None:
    model, text = tiny_vlm()
    with torch.no_grad():  # makes the end the likeliest token everywhere
        model.lm_head = torch.nn.Linear(32, model.lm_head.out_features)
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()[text.end_id] = 1
    assert answer(model, text, [cut_tiles(picture(0), 16, 4, 4)], QUESTIONS[:2], [0, 0]) == ["", ""]


def test_no_questions() -> None:
    model, text = tiny_vlm()
    assert answer(model, text, [], [], []) == []
