"""Questions about pictures, scored by type with VQA's accuracy."""

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from mmfoundry.evals.answers import normalise_answer, vqa_accuracy
from mmfoundry.evals.metrics import mean
from mmfoundry.evals.questions import Question, read_questions, spread
from mmfoundry.evals.samples import Samples
from mmfoundry.evals.task import EVAL_TASKS, Bench, EvalTask, Example, Row, Selection, TaskResult

NUM_EXAMPLES_PER_TYPE = 6


def best_constant_answer(questions: Sequence[Question]) -> tuple[str, float]:
    """The one answer that scores highest over these questions, and its score.

    Raises:
        ValueError: no questions.
    """
    candidates = Counter(normalise_answer(text) for question in questions for text in set(question.answers))
    scored = {
        text: sum(vqa_accuracy(text, question.answers) for question in questions) / len(questions)
        # an answer can score at most its share of the questions, so only the most frequent need a look
        for text, _ in candidates.most_common(20)
    }
    best = max(scored, key=lambda text: scored[text])
    return best, scored[best]


@EVAL_TASKS.register("vqa")
class Vqa(EvalTask):
    """Exact match of answers to questions about pictures, by question type."""

    needs: ClassVar[Literal["clip", "vlm"]] = "vlm"

    scenes: Selection = Field(description="pictures with `questions` in their JSON")
    types: list[str] | None = Field(None, description="question types to ask; null: all that there are")
    per_type: int | None = Field(None, ge=1, description="questions of each type; null: all")
    untrained_per_type: int = Field(100, ge=0, description="questions of each type put to the untrained model; 0: none")
    batch_size: int = Field(128, ge=1, description="questions a call of the model")

    def run(self, name: str, bench: Bench) -> TaskResult:
        """Ask every question and score each type on its own."""
        samples = bench.open(self.scenes)
        questions = read_questions(samples, self.types, self.per_type)
        replies = bench.ask(samples, self.scenes, questions, self.batch_size)
        correct = np.array([vqa_accuracy(reply, q.answers) for reply, q in zip(replies, questions, strict=True)])
        untrained = self._untrained(bench, samples, questions)
        rows = []
        for kind in dict.fromkeys(question.type for question in questions):
            of_kind = [i for i, question in enumerate(questions) if question.type == kind]
            asked = [questions[i] for i in of_kind]
            choices = {normalise_answer(text) for question in asked for text in question.answers}
            estimate = mean(correct[of_kind], clusters=[question.row for question in asked], seed=bench.seed)
            constant = best_constant_answer(asked)[1]
            baselines = {"chance": 1 / len(choices), "untrained": untrained.get(kind), "constant": constant}
            rows.append(Row.of(name, f"{name}_{kind}", estimate, **baselines))
        predictions = [
            {
                "key": samples.key(question.row),
                "type": question.type,
                "question": question.text,
                "answers": list(question.answers),
                "predicted": reply,
                "score": float(score),
            }
            for question, reply, score in zip(questions, replies, correct, strict=True)
        ]
        return TaskResult(rows, predictions, _examples(samples, questions, replies, correct, bench.seed))

    def _untrained(self, bench: Bench, samples: Samples, questions: list[Question]) -> dict[str, float]:
        """Accuracy by type of the model before tuning, on an even share of the questions."""
        if bench.untrained_vlm is None or self.untrained_per_type == 0:
            return {}
        scores = {}
        for kind in dict.fromkeys(question.type for question in questions):
            part = spread([question for question in questions if question.type == kind], self.untrained_per_type)
            replies = bench.ask(samples, self.scenes, part, self.batch_size, untrained=True)
            right = [vqa_accuracy(reply, question.answers) for reply, question in zip(replies, part, strict=True)]
            scores[kind] = float(np.mean(right))
        return scores


def _examples(
    samples: Samples, questions: list[Question], replies: list[str], correct: np.ndarray, seed: int
) -> list[Example]:
    """Of each type, right and wrong answers: as many of either as there are, up to half the places, then the rest."""
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    for kind in dict.fromkeys(question.type for question in questions):
        shuffled = rng.permutation([i for i, question in enumerate(questions) if question.type == kind]).tolist()
        wrong = [i for i in shuffled if correct[i] < 1][: NUM_EXAMPLES_PER_TYPE // 2]
        right = [i for i in shuffled if correct[i] == 1][: NUM_EXAMPLES_PER_TYPE - len(wrong)]
        chosen += right + wrong
    return [
        Example(
            [samples.picture(questions[i].row)],
            bool(correct[i] == 1),
            {
                "type": questions[i].type,
                "question": questions[i].text,
                "answered": replies[i],
                "right answer": " / ".join(dict.fromkeys(questions[i].answers)),
            },
        )
        for i in chosen
    ]
