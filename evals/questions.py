"""Questions about pictures: read from the samples' JSON, put to a model, shared out over the ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from mmfoundry.data.instructions import Turns
from mmfoundry.evals.samples import Samples
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.errors import DamagedInput
from mmfoundry.pipeline.progress import Progress

T = TypeVar("T")
# Pictures (H, W, 3) uint8, questions, and which picture each question is about, to one answer a question. A model may
# look at a picture once for all that is asked about it.
Answer = Callable[[Sequence[NDArray[np.uint8]], Sequence[str], Sequence[int]], list[str]]


@dataclass(frozen=True)
class Talk:
    """Conversations about one picture, answers included, none of which sees another.

    Attributes:
        key: of the sample.
        picture: (H, W, 3) uint8.
        conversations: each a list of turns with `role` and `content`.
    """

    key: str
    picture: NDArray[np.uint8]
    conversations: Sequence[Turns]


# Talks to float64 (talks, 3): cross-entropy in nats, summed over the tokens of the answers; how many these are; and how
# many of them score highest.
Score = Callable[[Sequence[Talk]], NDArray[np.float64]]


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
        per_type: how many to take of each type, drawn from all samples; None takes all.

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


def spread(questions: list[T], limit: int | None) -> list[T]:
    """At most `limit` of the questions, in their order, drawn by a fixed seed.

    Not every so many: where yes and no alternate, every second question would have the same answer.
    """
    if limit is None or len(questions) <= limit:
        return questions
    return [questions[i] for i in sorted(np.random.default_rng(0).permutation(len(questions))[:limit].tolist())]


def ask(
    answer: Answer,
    samples: Samples,
    questions: Sequence[Question],
    runtime: Runtime,
    batch: int,
    shown: Progress | None = None,
) -> list[str]:
    """The model's answers in the order of `questions`; each rank answers its share.

    Args:
        answer: the model under test.
        samples: where the pictures are.
        questions: what to ask; those about one picture go to the model in one call.
        runtime: ranks to share the work.
        batch: questions a call, about; a picture's questions are not split.
        shown: counts the answers of all ranks.
    """
    by_picture: dict[int, list[int]] = {}
    for i, question in enumerate(questions):
        by_picture.setdefault(question.row, []).append(i)
    mine = sorted(by_picture)[runtime.rank :: runtime.world_size]
    given: dict[int, str] = {}
    while mine:
        rows: list[int] = []
        while mine and (not rows or sum(len(by_picture[row]) for row in [*rows, mine[0]]) <= batch):
            rows.append(mine.pop(0))
        part = [i for row in rows for i in by_picture[row]]
        picture_of = [rows.index(questions[i].row) for i in part]
        replies = answer([samples.picture(row) for row in rows], [questions[i].text for i in part], picture_of)
        if len(replies) != len(part):
            raise RuntimeError(f"the model gave {len(replies)} answers to {len(part)} questions")
        given.update(zip(part, replies, strict=True))
        if shown is not None:
            shown.advance(min(len(part) * runtime.world_size, len(questions) - shown.done))
    if runtime.group is not None:
        shares: list[dict[int, str]] = [{} for _ in range(runtime.world_size)]
        dist.all_gather_object(shares, given, group=runtime.group)
        given = {i: text for share in shares for i, text in share.items()}
    return [given[i] for i in range(len(questions))]
