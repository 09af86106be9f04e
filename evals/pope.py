"""POPE: does the model see things that are not there? (Li et al. 2023, arXiv 2305.10355)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from mmfoundry.evals.answers import says_yes_or_no
from mmfoundry.evals.metrics import Bools, Estimate, bootstrap, ratio_of_sums
from mmfoundry.evals.questions import read_questions, spread
from mmfoundry.evals.task import EVAL_TASKS, Bench, EvalTask, Row, Selection, TaskResult
from mmfoundry.pipeline.errors import DamagedInput


def pope_scores(
    said_yes: Bools, is_yes: Bools, clusters: Sequence[object] | None = None, seed: int = 0
) -> dict[str, Estimate]:
    """POPE's five scores with intervals; "yes" is the positive class, and 0 / 0 is 0.

    Args:
        said_yes: (n,) the model's answers.
        is_yes: (n,) the truth.
        clusters: the picture of each question.
        seed: of the bootstrap.

    Returns:
        accuracy, precision, recall, f1, yes_ratio.
    """
    said, true = np.asarray(said_yes, np.float64), np.asarray(is_yes, np.float64)
    both = said * true
    one = np.ones(len(said))
    statistics = {
        "accuracy": ratio_of_sums(said == true, one),
        "precision": ratio_of_sums(both, said),
        "recall": ratio_of_sums(both, true),
        "f1": ratio_of_sums(2 * both, said + true),
        "yes_ratio": ratio_of_sums(said, one),
    }
    return {
        name: bootstrap(statistic, len(said), clusters=clusters, seed=seed) for name, statistic in statistics.items()
    }


@EVAL_TASKS.register("pope")
class Pope(EvalTask):
    """Yes/no questions about what is in a picture: accuracy, precision, recall, F1 and the share of yes."""

    needs: ClassVar[Literal["clip", "vlm"]] = "vlm"

    scenes: Selection = Field(description="pictures with `questions` in their JSON")
    type: str = Field("presence", description="question type that is answered by yes or no")
    per_type: int | None = Field(None, ge=1, description="how many questions; null: all")
    untrained_questions: int = Field(100, ge=0, description="questions put to the untrained model; 0: none")
    batch_size: int = Field(128, ge=1, description="questions a call of the model")

    def run(self, name: str, bench: Bench) -> TaskResult:
        """Ask every yes/no question; answers that a `vqa` task got in the same run are not asked for again."""
        samples = bench.open(self.scenes)
        questions = read_questions(samples, [self.type], self.per_type)
        truth = [question.answers[0].lower() for question in questions]
        if not set(truth) <= {"yes", "no"}:
            raise DamagedInput(f"{name}: questions of type {self.type!r} have answers other than yes and no")
        replies = bench.ask(samples, self.scenes, questions, self.batch_size)
        is_yes = np.array([text == "yes" for text in truth])
        scores = pope_scores(_said_yes(replies), is_yes, [question.row for question in questions], bench.seed)
        untrained: dict[str, Estimate] = {}
        if bench.untrained_vlm is not None and self.untrained_questions:
            part = spread(questions, self.untrained_questions)
            replies = bench.ask(samples, self.scenes, part, self.batch_size, untrained=True)
            untrained = pope_scores(_said_yes(replies), np.array([q.answers[0].lower() == "yes" for q in part]))
        share = float(is_yes.mean())
        # A coin that says yes half the time, and always saying yes or always no, whichever scores higher.
        chance = {"accuracy": 0.5, "precision": share, "recall": 0.5, "f1": 2 * 0.5 * share / (0.5 + share)}
        constant = {"accuracy": max(share, 1 - share), "precision": share, "recall": 1.0, "f1": 2 * share / (1 + share)}
        return TaskResult(
            [
                Row.of(
                    name,
                    f"{name}_{score}",
                    estimate,
                    chance=chance.get(score),
                    untrained=untrained[score].value if untrained else None,
                    constant=constant.get(score),
                )
                for score, estimate in scores.items()
            ]
        )


def _said_yes(replies: Sequence[str]) -> Bools:
    return np.array([says_yes_or_no(reply) == "yes" for reply in replies])
