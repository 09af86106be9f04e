"""Teach a vision-language model a new kind of question through LoRA, with the old kinds mixed in.

The part of the `adapt` stage that is about vision-language models; `stages/adapt.py` runs it. Without old questions in
the mix, what was learnt before is lost within a minute of training (counting fell from 100% to 30%).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from mmfoundry.data.reader import Pool
from mmfoundry.evals.answers import normalise_answer, vqa_accuracy
from mmfoundry.evals.metrics import Estimate, Floats, difference, mean
from mmfoundry.evals.questions import Question, ask, read_questions
from mmfoundry.evals.samples import Samples, select
from mmfoundry.evals.task import Example
from mmfoundry.evals.vqa import best_constant_answer
from mmfoundry.models.adapters.lora import LoraSettings, add_lora, merge_lora, save_lora
from mmfoundry.models.vlm_io import load_vlm, save_vlm
from mmfoundry.pipeline.artifact import write_atomic
from mmfoundry.pipeline.config import ArtifactRef, Config
from mmfoundry.pipeline.distributed import barrier
from mmfoundry.pipeline.stage import RunContext
from mmfoundry.pipeline.trainer_config import TrainerConfig
from mmfoundry.stages.answering import answerer
from mmfoundry.stages.eval import write_examples
from mmfoundry.stages.evaluations import VlmEvaluationConfig, check_eval_steps
from mmfoundry.stages.instruct import BLOCKS, QuestionsConfig, TuneConfig, tune
from mmfoundry.stages.pretrain import DataSource, LoaderConfig

ADAPTER = "vlm-lora"  # folder of the adapter in the artifact, in peft's format
MERGED = "vlm"
RESULTS = "vlm_results.json"
BEFORE = "vlm_before.json"  # the base's answers; kept, so that a cut-off run does not ask again
NUM_EXAMPLES = 24


class AdaptVlmConfig(Config):
    """New questions for a vision-language model."""

    model: ArtifactRef = Field(description="the model to adapt: an instruct artifact")
    data: list[DataSource] = Field(min_length=1, description="pictures with `questions` in their JSON to learn from")
    test: ArtifactRef = Field(description="other pictures with `questions`")
    new_types: list[str] = Field(min_length=1, description="question types that the model was not tuned on")
    old_types: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="question types that it must not lose -> share among the old questions, any unit",
    )
    old_share: float = Field(0.5, ge=0, lt=1, description="share of the questions learnt from that are of old types")
    max_questions: int = Field(8, ge=1, description="questions a picture, drawn anew each time it is seen")
    per_type: int = Field(200, ge=1, description="questions of each type that the model is tested with, at most")
    batch_size: int = Field(192, ge=1, description="questions a call of the model in the tests")
    lora: LoraSettings = Field(LoraSettings(), description="size and places of the adapters")
    merge: bool = Field(False, description="also write the model with the adapters merged into it, as vlm/")
    loader: LoaderConfig = Field(LoaderConfig(), description="how samples are read")
    eval: VlmEvaluationConfig | None = Field(
        None, description="what is measured every trainer.eval_steps steps, on all ranks; `eval/...` in the log"
    )
    trainer: TrainerConfig = Field(description="batch size (pictures), steps, optimizer, schedule, checkpoints")

    @model_validator(mode="after")
    def _types_differ(self) -> AdaptVlmConfig:
        both = sorted({*self.new_types} & {*self.old_types})
        if both:
            raise ValueError(f"{both[0]} is in new_types and in old_types")
        if self.old_share > 0 and not self.old_types:
            raise ValueError("old_share is above 0, but there are no old_types")
        check_eval_steps(self.eval, self.trainer)
        return self

    def shares(self) -> dict[str, float]:
        """Share of each question type in what is learnt from."""
        new = {name: (1 - self.old_share) / len(self.new_types) for name in self.new_types}
        total = sum(self.old_types.values())
        return new | {name: self.old_share * w / total for name, w in self.old_types.items() if self.old_share > 0}


@dataclass(frozen=True)
class _Test:
    """What the model is asked before and after."""

    samples: Samples
    questions: list[Question]

    def of(self, types: list[str]) -> list[int]:
        """The questions of these types, by number."""
        return [number for number, question in enumerate(self.questions) if question.type in types]

    def scores(self, replies: list[str]) -> Floats:
        """Accuracy of each reply."""
        pairs = zip(replies, self.questions, strict=True)
        return np.array([vqa_accuracy(reply, question.answers) for reply, question in pairs])


def adapt_vlm(config: AdaptVlmConfig, context: RunContext) -> dict[str, float]:
    """Adapt, save the adapter as `vlm-lora/`, and compare on the test pictures.

    Returns:
        vlm_before, vlm_after: accuracy on the new types; vlm_old_before, vlm_old_after: on the old types; the paired
        differences vlm_gain and vlm_old_change; each with `_low` and `_high` (95%); vlm_<type>_before and _after;
        vlm_constant, what the best constant answer to the new types scores.

    Raises:
        DamagedInput: a question of the test pictures lacks a part, or a wanted type has none.
    """
    model, text = load_vlm(context.resolve(config.model))
    model.to(context.runtime.device)
    samples = select(Pool(context.resolve(config.test)), {})
    types = [*config.new_types, *config.old_types]
    test = _Test(samples, read_questions(samples, types, config.per_type))
    answer = answerer(model, text)

    def replies(description: str) -> list[str]:
        with context.progress(len(test.questions), description, "questions") as shown:
            return ask(answer, test.samples, test.questions, context.runtime, config.batch_size, shown)

    kept = context.work / BEFORE
    barrier(context.runtime.group)  # rank 0 may be about to write what the others look for
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else replies("vlm: before")
    barrier(context.runtime.group)
    if context.runtime.is_main:
        write_atomic(kept, json.dumps(before) + "\n")
    lora = add_lora(model, config.lora, BLOCKS, context.config.seed)
    questions = QuestionsConfig(types=config.shares(), max_questions=config.max_questions)
    tuning = TuneConfig(
        data=config.data,
        questions=questions,
        lora=config.lora,
        connector_lr_scale=0,
        eval=config.eval,
        trainer=config.trainer,
    )
    tuned = tune(tuning, config.loader, context, model, text, phase="vlm", prefix="vlm.")
    after = replies("vlm: after")
    if context.runtime.is_main:
        save_lora(model, lora, context.work / ADAPTER, base="")
        if config.merge:
            save_vlm(merge_lora(model), text, context.work / MERGED)  # type: ignore[arg-type]  # the same model
        kept.unlink()
    metrics = _results(config, context, test, before, after)
    return metrics | {"vlm_loss": tuned.mean_loss, "vlm_samples_per_second": tuned.samples_per_second}


def _results(
    config: AdaptVlmConfig, context: RunContext, test: _Test, before: list[str], after: list[str]
) -> dict[str, float]:
    """Metrics of the stage; the main rank also writes them as table rows, and examples."""
    scores = {"before": test.scores(before), "after": test.scores(after)}
    rows = [question.row for question in test.questions]  # questions about one picture are right or wrong together
    metrics: dict[str, float] = {}
    table = []
    for prefix, types in (("vlm", config.new_types), ("vlm_old", list(config.old_types))):
        chosen = test.of(types)
        if not chosen:
            continue
        clusters = [rows[number] for number in chosen]
        part = {name: values[chosen] for name, values in scores.items()}
        estimates = {name: mean(values, clusters=clusters) for name, values in part.items()}
        constant = best_constant_answer([test.questions[number] for number in chosen])[1]
        baselines = {"chance": None, "untrained": None, "constant": constant}
        table += [_row(f"{prefix}_{name}", estimate, baselines) for name, estimate in estimates.items()]
        change = difference(part["after"], part["before"], clusters=clusters)
        metrics[f"{prefix}_constant"] = constant
        for name, estimate in {**estimates, "gain" if prefix == "vlm" else "change": change}.items():
            metrics |= {f"{prefix}_{name}": estimate.value}
            metrics |= {f"{prefix}_{name}_low": estimate.low, f"{prefix}_{name}_high": estimate.high}
    for kind in [*config.new_types, *config.old_types]:
        for name, values in scores.items():
            metrics[f"vlm_{kind}_{name}"] = float(values[test.of([kind])].mean())
    if context.runtime.is_main:
        write_atomic(context.work / RESULTS, json.dumps({"rows": table}, indent=1) + "\n")
        chosen = test.of(config.new_types)
        write_examples(context.work / "examples" / "adapt_vlm", _examples(test, chosen, before, after, context))
    return metrics


def _row(metric: str, estimate: Estimate, baselines: Mapping[str, float | None]) -> dict[str, object]:
    return {"task": "adapt_vlm", "metric": metric, **asdict(estimate), **baselines}


def _examples(
    test: _Test, chosen: list[int], before: list[str], after: list[str], context: RunContext
) -> list[Example]:
    """New questions with the answers before and after; half of them where the two differ."""
    order = np.random.default_rng(context.config.seed).permutation(chosen).tolist()
    changed = [n for n in order if normalise_answer(before[n]) != normalise_answer(after[n])][: NUM_EXAMPLES // 2]
    others = [number for number in order if number not in changed][: NUM_EXAMPLES - len(changed)]
    right = test.scores(after)
    return [
        Example(
            [test.samples.picture(test.questions[number].row)],
            bool(right[number] == 1),
            {
                "type": test.questions[number].type,
                "question": test.questions[number].text,
                "before": before[number],
                "after": after[number],
                "right answer": " / ".join(dict.fromkeys(test.questions[number].answers)),
            },
        )
        for number in [*changed, *others]
    ]
