"""Conversations about pictures as training sequences: ids, labels on the answers, and who sees whom.

Several questions about one picture are packed into one sequence: the picture first, then each question with its answer
as a branch that sees the picture and itself, and no other question. So every question is learnt as it will be asked,
first and alone, and the picture is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmfoundry.data.decode import UnreadableSample
from mmfoundry.data.sample import Sample

IGNORED = -100  # the label of a position that nothing is learnt at
Turns = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Question:
    """A question of a sample's JSON: `questions: [{"type", "question", "answer"}]`."""

    type: str
    text: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class InstructionEncoder:
    """Sample and generator to one training sequence; an `encode` of the loader.

    A sample with `questions` gives one branch a question; one without gives its `messages` as a single conversation.

    Attributes:
        cut_tiles: picture (H, W, 3) to its tiles (n, 3, side, side), uint8.
        pieces: turns to consecutive texts, each with whether it is learnt.
        encode: text to ids and, for each id, the characters that it came from.
        image_text: number of tiles to the text that stands for the picture.
        placeholder: what stands for the picture in a turn; put before the first turn of the user where it is missing.
        patch_id: id of one image token in the encoded text; what a sequence's branches have in common ends at its last.
        types: question type to weight; a question is drawn in proportion to its type's weight, whatever the number of
            questions of a type. None draws from all alike.
        max_questions: branches of a sequence, drawn anew each time.
        max_tokens: of a sequence; questions that would go past it are left out, a conversation is cut there.
    """

    cut_tiles: Callable[[NDArray[np.uint8]], Tensor]
    pieces: Callable[[Turns], list[tuple[str, bool]]]
    encode: Callable[[str], tuple[list[int], list[tuple[int, int]]]]
    image_text: Callable[[int], str]
    placeholder: str
    patch_id: int
    types: Mapping[str, float] | None = None
    max_questions: int = 8
    max_tokens: int = 1024

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        """Encode one sample.

        Returns:
            tiles: (n, 3, side, side) uint8. input_ids, labels, branches, position_ids: (L,) int64, see `collate`.

        Raises:
            UnreadableSample: nothing to ask about it, or turns that are no conversation.
        """
        tiles = self.cut_tiles(sample.image)
        return {"__key__": sample.key, **self.sequence(tiles, self._conversations(sample, rng))}

    def sequence(self, tiles: Tensor, conversations: Sequence[Turns]) -> dict[str, Tensor]:
        """Conversations about one picture, packed; none sees another.

        Args:
            tiles: of the picture, (n, 3, side, side) uint8.
            conversations: in order; those that would go past `max_tokens` are left out.

        Returns:
            As for a sample, without its key.

        Raises:
            UnreadableSample: nothing to learn in them, or turns that are no conversation.
        """
        common: tuple[list[int], list[int]] = ([], [])
        branches: list[tuple[list[int], list[int]]] = []
        used = 0
        for turns in conversations:
            ids, labels = self.conversation(turns, len(tiles))
            cut = len(ids) - ids[::-1].index(self.patch_id)
            common = (ids[:cut], labels[:cut])
            # What comes after the last answer teaches nothing
            length = max((place + 1 for place, label in enumerate(labels) if label != IGNORED), default=cut) - cut
            if branches and len(common[0]) + used + length > self.max_tokens:
                continue
            end = cut + min(length, self.max_tokens - len(common[0]) - used)
            branches.append((ids[cut:end], labels[cut:end]))
            used += end - cut
        if all(label == IGNORED for _, labels in [common, *branches] for label in labels):
            raise UnreadableSample("no answer to learn", f"within {self.max_tokens} tokens")
        return {"tiles": tiles, **_pack(common, branches)}

    def conversation(self, turns: Turns, num_tiles: int) -> tuple[list[int], list[int]]:
        """Ids and labels of one conversation about a picture of so many tiles.

        Raises:
            UnreadableSample: the turns are no conversation about one picture.
        """
        try:
            pieces = self.pieces(_with_picture(turns, self.placeholder))
        except ValueError as error:
            raise UnreadableSample("messages are not a conversation", str(error)) from error
        picture = self.image_text(num_tiles)
        text, learnt = "", []
        for piece, is_learnt in pieces:
            start = len(text)
            text += piece.replace(self.placeholder, picture)
            if is_learnt:
                learnt.append((start, len(text)))
        ids, offsets = self.encode(text)
        labels = [IGNORED] * len(ids)
        for start, end in learnt:
            for position, (first, _) in enumerate(offsets):
                if start <= first < end:
                    labels[position] = ids[position]
        return ids, labels

    def _conversations(self, sample: Sample, rng: np.random.Generator) -> list[Turns]:
        questions = questions_of(sample)
        if self.types is not None:
            questions = [question for question in questions if self.types.get(question.type, 0) > 0]
        elif not questions and sample.messages:
            return [sample.messages]
        if not questions:
            raise UnreadableSample("no question of the wanted types and no messages")
        count_of: dict[str, int] = {}
        for question in questions:
            count_of[question.type] = count_of.get(question.type, 0) + 1
        weights = np.array([1.0 if self.types is None else self.types[q.type] / count_of[q.type] for q in questions])
        size = min(self.max_questions, len(questions))
        chosen = rng.choice(len(questions), size, replace=False, p=weights / weights.sum())
        return [
            [
                {"role": "user", "content": questions[i].text},
                {"role": "assistant", "content": questions[i].answer},
            ]
            for i in chosen
        ]


def questions_of(sample: Sample) -> list[Question]:
    """The questions in a sample's JSON; the first answer where it has several.

    Raises:
        UnreadableSample: an entry lacks a part.
    """
    found = []
    for entry in sample.meta.get("questions", []):
        try:
            answer = entry["answers"][0] if "answers" in entry else entry["answer"]
            found.append(Question(entry["type"], entry["question"], answer))
        except (TypeError, KeyError, IndexError) as error:
            raise UnreadableSample("a question lacks a part", f"{entry!r}") from error
    return found


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sequences to a batch, padded on the right to the longest.

    Returns:
        tiles: (n, 3, side, side) uint8, of all pictures in the order of their placeholders. input_ids: (b, L).
        labels: (b, L), `IGNORED` where nothing is learnt. branches: (b, L), 0 what all branches see, 1, 2, ... the
        branches, -1 padding. position_ids: (b, L). All int64. __key__: the samples' keys.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": IGNORED, "branches": -1, "position_ids": 0}
    batch: dict[str, Any] = {
        name: torch.stack([_padded(row[name], longest, value) for row in rows]) for name, value in fill.items()
    }
    return batch | {"tiles": torch.cat([row["tiles"] for row in rows]), "__key__": [row["__key__"] for row in rows]}


def _padded(values: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - len(values)), value=value)


def _pack(common: tuple[list[int], list[int]], branches: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """One sequence: what is common, then the branches one after the other, each counted on from the common part."""
    start = len(common[0])
    ids, labels = list(common[0]), list(common[1])
    numbers, positions = [0] * start, list(range(start))
    for number, (branch, branch_labels) in enumerate(branches, start=1):
        ids += branch
        labels += branch_labels
        numbers += [number] * len(branch)
        positions += range(start, start + len(branch))
    parts = {"input_ids": ids, "labels": labels, "branches": numbers, "position_ids": positions}
    return {name: torch.tensor(values, dtype=torch.int64) for name, values in parts.items()}


def _with_picture(turns: Turns, placeholder: str) -> list[dict[str, Any]]:
    """The turns with exactly one placeholder, at the start of the user's first turn unless it stands elsewhere.

    Raises:
        ValueError: two placeholders, no turn of the user, or content that is not text.
    """
    copied = [dict(turn) for turn in turns]
    if not all(isinstance(turn.get("content"), str) for turn in copied):
        raise ValueError("the content of a turn is not text")
    count = sum(turn["content"].count(placeholder) for turn in copied)
    if count > 1:
        raise ValueError(f"{count} pictures in one conversation; one can be used")
    asked = [turn for turn in copied if turn.get("role") == "user"]
    if not asked:
        raise ValueError("no turn of the user")
    if count == 0:
        asked[0]["content"] = placeholder + asked[0]["content"]
    return copied
