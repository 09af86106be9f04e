"""Questions about pictures: read from the samples' JSON, put to a model, shared out over the ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from mmfoundry.evals.samples import Samples
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.errors import DamagedInput

# Pictures (H, W, 3) uint8 and one question each, to one answer each.
Answer = Callable[[Sequence[NDArray[np.uint8]], Sequence[str]], list[str]]


@dataclass(frozen=True)
class Question:
    """One question about one picture.

    Attributes:
        row: of its picture in the samples.
        type: what kind of question it is, e.g. `count`.
        text: as it is put to the model.
        answers: reference answers, one or more.
    """

    row: int
    type: str
    text: str
    answers: tuple[str, ...]


def read_questions(samples: Samples, types: Sequence[str] | None = None, per_type: int | None = None) -> list[Question]:
    """The questions in the samples' JSON: `questions: [{type, question, answer | answers}]`.

    Args:
        samples: whose JSON to read.
        types: question types wanted; None takes all.
        per_type: how many to take of each type, spread over the samples in order; None takes all.

    Raises:
        DamagedInput: a question lacks a part, or a wanted type has none.
    """
    found: dict[str, list[Question]] = {}
    for row, meta in enumerate(samples.meta):
        for entry in meta.get("questions", []):
            question = _question(samples, row, entry)
            if types is None or question.type in types:
                found.setdefault(question.type, []).append(question)
    missing = sorted(set(types or ()) - found.keys())
    if missing or not found:
        raise DamagedInput(f"no sample has a question of type {', '.join(missing) or 'any kind'} in its JSON")
    return [question for name in sorted(found) for question in spread(found[name], per_type)]


def _question(samples: Samples, row: int, entry: Any) -> Question:
    try:
        answers = tuple(entry["answers"]) if "answers" in entry else (entry["answer"],)
        return Question(row, entry["type"], entry["question"], answers)
    except (TypeError, KeyError) as error:
        raise DamagedInput(f"sample {samples.key(row)}: a question lacks {error}; it has {entry!r}") from error


def spread(questions: list[Question], limit: int | None) -> list[Question]:
    """At most `limit` of the questions, at even distances, so that no part of the data is left out."""
    if limit is None or len(questions) <= limit:
        return questions
    return [questions[i] for i in np.linspace(0, len(questions) - 1, limit).round().astype(int)]


def ask(answer: Answer, samples: Samples, questions: Sequence[Question], runtime: Runtime, batch: int) -> list[str]:
    """The model's answers in the order of `questions`; each rank answers its share.

    Args:
        answer: pictures and one question each, to one answer each.
        samples: where the pictures are.
        questions: what to ask; questions about one picture should stand together, they are asked in one batch.
        runtime: ranks to share the work.
        batch: questions a call.
    """
    by_picture = sorted(range(len(questions)), key=lambda i: (questions[i].row, i))
    mine = by_picture[runtime.rank :: runtime.world_size]
    given: dict[int, str] = {}
    for start in range(0, len(mine), batch):
        part = mine[start : start + batch]
        pictures = {questions[i].row: samples.picture(questions[i].row) for i in part}
        replies = answer([pictures[questions[i].row] for i in part], [questions[i].text for i in part])
        if len(replies) != len(part):
            raise RuntimeError(f"the model gave {len(replies)} answers to {len(part)} questions")
        given.update(zip(part, replies, strict=True))
    if runtime.group is not None:
        shares: list[dict[int, str]] = [{} for _ in range(runtime.world_size)]
        dist.all_gather_object(shares, given, group=runtime.group)
        given = {i: text for share in shares for i, text in share.items()}
    return [given[i] for i in range(len(questions))]
