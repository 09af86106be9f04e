"""Held-out loss of a vision-language model: how well it foresees answers that it was not tuned on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mmfoundry.data.instructions import Turns
from mmfoundry.evals.metrics import bootstrap, ratio_of_sums
from mmfoundry.evals.questions import Score, Talk, read_questions, spread
from mmfoundry.evals.samples import Samples
from mmfoundry.evals.task import EVAL_TASKS, Bench, EvalTask, Row, Selection, TaskResult, joint_rows
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.errors import DamagedInput


@EVAL_TASKS.register("answer_loss")
class AnswerLoss(EvalTask):
    """Cross-entropy of the right answers' tokens, and the share of them that score highest, over all tokens alike.

    What `instruct` and `adapt` minimise, on pictures held out. Each question is foreseen as it is asked: first and
    alone. The numbers do not depend on how many ranks there are: what goes through the model together is fixed.
    """

    needs: ClassVar[Literal["clip", "vlm"]] = "vlm"

    scenes: Selection = Field(description="pictures with `questions` or `messages` in their JSON")
    types: list[str] | None = Field(None, description="question types; null: all, and messages where there are none")
    per_type: int | None = Field(None, ge=1, description="questions of each type; null: all")
    untrained_pictures: int = Field(100, ge=0, description="pictures for the untrained model; 0: none")
    batch_size: int = Field(64, ge=1, description="questions a call of the model; a picture's are not split")

    def run(self, name: str, bench: Bench) -> TaskResult:
        """Score every answer; a picture is drawn as one in the intervals."""
        samples = bench.open(self.scenes)
        talks = read_conversations(samples, self.types, self.per_type)
        vlms = bench.vlms()
        with bench.progress(len(talks), "answers", "pictures") as shown:
            scored = score(vlms["trained"].score, samples, talks, bench.runtime, self.batch_size)
            shown.advance(len(talks))
        before = None
        if "untrained" in vlms and self.untrained_pictures:
            part = {row: talks[row] for row in spread(list(talks), self.untrained_pictures)}
            nats, tokens, right = score(vlms["untrained"].score, samples, part, bench.runtime, self.batch_size).sum(0)
            before = {"loss": nats / tokens, "token_accuracy": right / tokens}
        nats_n, tokens_n, right_n = scored.T
        rows = []
        for metric, sums in (("loss", nats_n), ("token_accuracy", right_n)):
            estimate = bootstrap(ratio_of_sums(sums, tokens_n), len(talks), seed=bench.seed)
            untrained = None if before is None else float(before[metric])
            rows.append(Row.of(name, f"{name}_{metric}", estimate, untrained=untrained))
        return TaskResult([replace(rows[0], unit="nats"), rows[1]])


def read_conversations(
    samples: Samples, types: Sequence[str] | None = None, per_type: int | None = None
) -> dict[int, list[Turns]]:
    """What is asked and answered about each picture, by row; rows without anything are left out.

    Args:
        samples: whose JSON to read.
        types: question types wanted; None takes all, and `messages` of samples without questions.
        per_type: how many questions to take of each type; None takes all.

    Raises:
        DamagedInput: a question lacks a part, a wanted type has none, or no sample has questions or messages.
    """
    found: dict[int, list[Turns]] = {}
    if types is not None or any(meta.get("questions") for meta in samples.meta):
        for question in read_questions(samples, types, per_type):
            asked = {"role": "user", "content": question.text}
            found.setdefault(question.row, []).append([asked, {"role": "assistant", "content": question.answers[0]}])
    if types is None:
        for row, meta in enumerate(samples.meta):
            if not meta.get("questions") and meta.get("messages"):
                found[row] = [meta["messages"]]
    if not found:
        raise DamagedInput("no sample has questions or messages in its JSON")
    return dict(sorted(found.items()))


def score(
    model: Score, samples: Samples, talks: Mapping[int, list[Turns]], runtime: Runtime, batch: int
) -> NDArray[np.float64]:
    """What `model` says of each picture's conversations, (pictures, 3), in their order, the same on every rank.

    Batches are those of one process, dealt out over the ranks, so that the same rows go through the model together.
    """
    batches: list[list[int]] = []
    used = batch
    for place, conversations in enumerate(talks.values()):
        if used + len(conversations) > batch:
            batches.append([])
            used = 0
        batches[-1].append(place)
        used += len(conversations)
    rows = list(talks)
    found = np.zeros((len(talks), 3))
    for places in batches[runtime.rank :: runtime.world_size]:
        part = [rows[place] for place in places]
        found[places] = model([Talk(samples.key(row), samples.picture(row), talks[row]) for row in part])
    return joint_rows(found, runtime)
