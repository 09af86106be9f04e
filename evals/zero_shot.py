"""Zero-shot classification: the class whose prompts lie nearest to the picture (Radford et al. 2021, section 3.1)."""

from importlib import resources
from typing import ClassVar, Literal

import numpy as np
import yaml
from pydantic import Field, field_validator

from mmfoundry.evals.embed import Embeddings, embed_pictures, embed_texts
from mmfoundry.evals.metrics import best_constant, bootstrap, mean, mean_per_class_recall, top_k_hits
from mmfoundry.evals.samples import Samples, class_indices, clusters_of
from mmfoundry.evals.task import EVAL_TASKS, Bench, Clip, EvalTask, Example, Row, Selection, TaskResult
from mmfoundry.pipeline.errors import ConfigError, DamagedInput

NUM_EXAMPLES = 12
NUM_NAMES = 5  # kept in a prediction


def load_templates(name: str) -> list[str]:
    """Prompt templates by the name of a file in evals/templates; `{}` stands for the class name.

    Raises:
        ConfigError: no such file; the message lists those that there are.
    """
    folder = resources.files("mmfoundry.evals") / "templates"
    known = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    if name not in known:
        raise ConfigError(f"templates {name!r} are not known; there are {', '.join(known)}")
    return list(yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")))


def class_embeddings(clip: Clip, names: list[str], templates: list[str]) -> Embeddings:
    """One embedding a class: the mean of its normalised prompt embeddings, normalised again.

    This is the rule of CLIP_benchmark and open_clip; averaging first and normalising once would weigh templates by
    the length of their vectors.

    Args:
        clip: the model under test.
        names: of the classes.
        templates: prompts with `{}` for the name.

    Returns:
        (classes, D), rows L2-normalised.
    """
    # Not str.format: a class name or template may contain braces of its own.
    prompts = [template.replace("{}", name) for name in names for template in templates]
    embeddings = embed_texts(clip, prompts).reshape(len(names), len(templates), -1)
    embeddings = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
    means = embeddings.mean(axis=1)
    return means / np.linalg.norm(means, axis=-1, keepdims=True)


@EVAL_TASKS.register("zero_shot")
class ZeroShot(EvalTask):
    """Names or categories of pictures through prompts, with no training on the classes: top-k and per-class recall."""

    needs: ClassVar[Literal["clip", "vlm"]] = "clip"

    pictures: Selection = Field(description="which pictures to classify")
    label: str = Field(description="metadata field that holds the class name")
    words: Literal["label", "caption"] = Field(
        "label", description="what stands for a class in the prompts: its label, or its first picture's first caption"
    )
    templates: str | list[str] = Field(
        "plain", description="prompts with {} for the name, or a file of evals/templates"
    )
    top: list[int] = Field([1, 5], min_length=1, description="values of k in top-k accuracy")
    labels_among: Selection | None = Field(
        None, description="samples whose labels are the candidate classes; null: those of `pictures`"
    )
    cluster_by: str | None = Field(
        None, description="metadata field; samples that share it (styles of one concept) are resampled together"
    )

    @field_validator("templates")
    @classmethod
    def _has_place_for_name(cls, value: str | list[str]) -> str | list[str]:
        templates = load_templates(value) if isinstance(value, str) else value
        if not templates or not all("{}" in template for template in templates):
            raise ValueError("every template needs {} where the class name goes")
        return value

    def run(self, name: str, bench: Bench) -> TaskResult:
        """Classify every picture among all classes."""
        samples = bench.open(self.pictures)
        labels = [str(label) for label in samples.field(self.label)]
        sources = [samples, bench.open(self.labels_among)] if self.labels_among else [samples]
        words = {label: words for source in reversed(sources) for label, words in self._class_words(source).items()}
        names, indices = class_indices([*labels, *words])
        target = indices[: len(labels)]
        templates = load_templates(self.templates) if isinstance(self.templates, str) else self.templates
        scores = {}
        for which, clip in bench.clips().items():
            pictures = embed_pictures(clip, samples, bench.runtime, bench.batch_size)
            scores[which] = pictures @ class_embeddings(clip, [words[each] for each in names], templates).T
        rows = self._rows(name, scores, target, clusters_of(samples, self.cluster_by), bench.seed)
        order = np.argsort(-scores["trained"], axis=1, kind="stable")
        predictions = [
            {"key": samples.key(row), "label": labels[row], "top": [names[c] for c in order[row, :NUM_NAMES]]}
            for row in range(len(samples))
        ]
        return TaskResult(rows, predictions, _examples(samples, predictions, bench.seed))

    def _class_words(self, samples: Samples) -> dict[str, str]:
        """What stands for each class of these samples in the prompts."""
        labels = [str(label) for label in samples.field(self.label)]
        if self.words == "label":
            return {label: label for label in labels}
        for row, captions in enumerate(samples.captions):
            if not captions:
                raise DamagedInput(f"sample {samples.key(row)} has no caption to stand for {labels[row]!r}")
        return {label: samples.captions[row][0] for row, label in reversed(list(enumerate(labels)))}

    def _rows(
        self, name: str, scores: dict[str, Embeddings], target: np.ndarray, clusters: list | None, seed: int
    ) -> list[Row]:
        num_classes = scores["trained"].shape[1]
        rows = []
        for k in self.top:
            hits = {which: top_k_hits(values, target, k) for which, values in scores.items()}
            rows.append(
                Row.of(
                    name,
                    f"{name}_top{k}" if len(self.top) > 1 else name,
                    mean(hits["trained"], clusters=clusters, seed=seed),
                    chance=min(1.0, k / num_classes),
                    untrained=float(hits["untrained"].mean()) if "untrained" in hits else None,
                    constant=best_constant(target, k),
                )
            )
        if len(np.unique(target)) == len(target):  # one picture a class: per-class recall is top-1 again
            return rows
        recall = {which: mean_per_class_recall(top_k_hits(v, target, 1), target) for which, v in scores.items()}
        one = np.ones((1, len(target)))
        rows.append(
            Row.of(
                name,
                f"{name}_mean_per_class_recall",
                bootstrap(recall["trained"], len(target), clusters=clusters, seed=seed),
                chance=1 / num_classes,
                untrained=float(recall["untrained"](one)[0]) if "untrained" in recall else None,
                constant=1 / len(np.unique(target)),
            )
        )
        return rows


def _examples(samples: Samples, predictions: list[dict], seed: int) -> list[Example]:
    chosen = np.random.default_rng(seed).permutation(len(samples))[:NUM_EXAMPLES]
    return [
        Example(
            [samples.picture(int(row))],
            predictions[row]["top"][0] == predictions[row]["label"],
            {"is": predictions[row]["label"], "named": predictions[row]["top"]},
        )
        for row in chosen
    ]
