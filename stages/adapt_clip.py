"""Teach a CLIP new names from a few pictures each, against zero-shot and a linear probe on the same pictures.

The part of the `adapt` stage that is about CLIPs; `stages/adapt.py` runs it. The zero-shot head stays: a class is what
its prompts say, so the adapted model still takes any text. Pictures of old names are learnt from along with the new
ones; without them the old names are lost (tried: from 28% right to 2%), with them both are learnt.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mmfoundry.data.loader import Loader, Source, stack
from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import Sample
from mmfoundry.data.shards import write_shards
from mmfoundry.data.transforms import TrainTransform
from mmfoundry.evals.embed import Embeddings, embed_pictures
from mmfoundry.evals.linear_probe import probe_scores
from mmfoundry.evals.metrics import Bools, Floats, Ints, best_constant, difference, mean, top_k_hits
from mmfoundry.evals.samples import Samples, select
from mmfoundry.evals.task import Clip, Example
from mmfoundry.evals.zero_shot import class_embeddings, load_templates
from mmfoundry.models.adapters.clip_lora import ClipLoraConfig, add_clip_lora
from mmfoundry.models.adapters.lora import save_lora
from mmfoundry.models.clip import CLIP
from mmfoundry.models.interop.load import load_any_clip
from mmfoundry.pipeline.artifact import write_atomic
from mmfoundry.pipeline.config import ArtifactRef, Config
from mmfoundry.pipeline.distributed import barrier
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.optimizers import decay_groups
from mmfoundry.pipeline.stage import RunContext
from mmfoundry.pipeline.trainer import train
from mmfoundry.pipeline.trainer_config import TrainerConfig
from mmfoundry.stages.captions import tokenizer_of
from mmfoundry.stages.eval import write_examples
from mmfoundry.stages.evaluations import EvaluationConfig, as_clip, check_eval_steps, while_training
from mmfoundry.stages.pretrain import data_metrics

ADAPTER = "clip-lora"  # folder of the adapter in the artifact, in peft's format
RESULTS = "clip_results.json"
NUM_EXAMPLES = 24


class OldNames(Config):
    """Names that the model knows and must not lose."""

    train: ArtifactRef = Field(description="pictures to learn from along with the new ones")
    test: ArtifactRef = Field(description="other pictures of the same classes")
    share: float = Field(0.5, gt=0, lt=1, description="share of the pictures learnt from that are of old names")


class AdaptClipConfig(Config):
    """Few-shot classification by a CLIP with LoRA; its zero-shot head stays."""

    model: ArtifactRef = Field(
        description="the CLIP to adapt: a pretrain artifact, or a transformers or open_clip folder"
    )
    train: ArtifactRef = Field(description="pictures to learn from; the first `shots` of each class are taken")
    test: ArtifactRef = Field(description="other pictures of the same classes")
    old: OldNames | None = Field(None, description="names to keep; null: whatever becomes of them")
    label: str = Field("concept", description="metadata field that holds the class name")
    templates: list[str] | str = Field(["{}"], description="prompts with {} for the name, or a file of evals/templates")
    shots: int = Field(8, ge=1, description="pictures of each class to learn from")
    lora: ClipLoraConfig = Field(ClipLoraConfig(), description="size and places of the adapters")
    crop_scale: tuple[float, float] = Field((0.9, 1.0), description="least and greatest share of the area of a crop")
    eval: EvaluationConfig | None = Field(
        None, description="what is measured every trainer.eval_steps steps, on all ranks; `eval/...` in the log"
    )
    trainer: TrainerConfig = Field(description="batch size (pictures), steps, optimizer, schedule, checkpoints")

    @field_validator("templates")
    @classmethod
    def _has_place_for_name(cls, value: list[str] | str) -> list[str] | str:
        templates = load_templates(value) if isinstance(value, str) else value
        if not templates or not all("{}" in template for template in templates):
            raise ValueError("every template needs {} where the class name goes")
        return value

    @model_validator(mode="after")
    def _crops(self) -> AdaptClipConfig:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale {self.crop_scale} needs 0 < least <= greatest <= 1")
        return self

    @model_validator(mode="after")
    def _measures(self) -> AdaptClipConfig:
        check_eval_steps(self.eval, self.trainer)
        return self


@dataclass(frozen=True)
class Classes:
    """Pictures of named classes: some to learn from, others to be tested with.

    Attributes:
        names: in alphabetical order.
        words: what stands for each in its prompts.
        shots, test: the pictures.
        shot_target, target: index into `names` of each.
    """

    names: list[str]
    words: list[str]
    shots: Samples
    test: Samples
    shot_target: Ints
    target: Ints

    @classmethod
    def of(cls, shots: Samples, test: Samples, label: str) -> Classes:
        """From two sets of pictures.

        Raises:
            ConfigError: a class is in one of them only.
        """
        given, asked = ([str(name) for name in part.field(label)] for part in (shots, test))
        if odd := sorted(set(given) ^ set(asked)):
            raise ConfigError(f"train and test have different classes: only one of them has {', '.join(odd[:5])}")
        names = sorted(set(given))
        index = {name: number for number, name in enumerate(names)}
        words: dict[str, str] = {}
        for name, captions in zip(given, shots.captions, strict=True):
            words.setdefault(name, captions[0] if captions else name)
        targets = [np.array([index[name] for name in part]) for part in (given, asked)]
        return cls(names, [words[name] for name in names], shots, test, *targets)


class PromptClassifier(nn.Module):
    """A CLIP as classifier: logits are scaled cosines between a picture and the prompts of each class."""

    prompts_cpL: Tensor  # noqa: N815  (shape suffix: classes, prompts, positions)

    def __init__(self, clip: CLIP, prompts_cpL: Tensor):
        super().__init__()
        self.clip = clip
        self.register_buffer("prompts_cpL", prompts_cpL, persistent=False)

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (b, classes) of `image`, (b, 3, side, side) uint8."""
        image_bD = self.clip.encode_image(self.clip.pixels(batch["image"]))
        prompt_cpD = self.clip.encode_text(self.prompts_cpL.flatten(0, 1)).unflatten(0, self.prompts_cpL.shape[:2])
        return self.clip.scale() * image_bD @ F.normalize(prompt_cpD.mean(dim=1), dim=-1).T


def classify(logits_bc: Tensor, batch: Mapping[str, Any], group: ProcessGroup | None = None) -> dict[str, Tensor]:
    """Cross-entropy over the classes, mean over this rank's pictures; every rank has as many."""
    label_b = batch["label"].long()
    return {
        "loss": F.cross_entropy(logits_bc.float(), label_b),
        "accuracy": (logits_bc.argmax(1) == label_b).float().mean(),
    }


def adapt_clip(config: AdaptClipConfig, context: RunContext) -> dict[str, float]:
    """Adapt, save the adapter as `clip-lora/`, and compare on the test pictures.

    Returns:
        clip_before (zero-shot), clip_after, clip_linear_probe (on the same shots), all among the new names;
        clip_among_all: new pictures among new and old names, after; clip_old_before, clip_old_after: old pictures among
        old names; the paired differences clip_gain (after - before), clip_gain_over_linear_probe, clip_old_change; each
        with `_low` and `_high` (95%). clip_constant and clip_loss.

    Raises:
        ConfigError: a class has fewer pictures than `shots`, or train and test have different classes.
    """
    new = Classes.of(
        few_shot(select(Pool(context.resolve(config.train)), {}), config.label, config.shots),
        select(Pool(context.resolve(config.test)), {}),
        config.label,
    )
    old = None
    if config.old is not None:
        learnt, asked = (select(Pool(context.resolve(ref)), {}) for ref in (config.old.train, config.old.test))
        old = Classes.of(learnt, asked, config.label)
        if both := sorted(set(old.names) & set(new.names)):
            raise ConfigError(f"{both[0]} is among the new names and among the old ones")
    templates = load_templates(config.templates) if isinstance(config.templates, str) else config.templates
    model = load_any_clip(context.resolve(config.model)).to(context.runtime.device)
    clip = as_clip(model)
    seed = context.config.seed
    seen, unseen = (embed_pictures(clip, part, context.runtime) for part in (new.shots, new.test))
    scores = {
        "before": unseen @ class_embeddings(clip, new.words, templates).T,
        "linear_probe": probe_scores(seen, new.shot_target, unseen, len(new.names), None, seed),
    }
    old_scores = {} if old is None else {"before": _zero_shot(clip, old, templates, context)}
    lora = add_clip_lora(model, config.lora, seed)
    loss = _train(config, context, model, new, old, templates)
    scores["after"] = _zero_shot(clip, new, templates, context)
    if old is not None:
        old_scores["after"] = _zero_shot(clip, old, templates, context)
        scores["among_all"] = _zero_shot(clip, new, templates, context, also=old.words)
    if context.runtime.is_main:
        save_lora(model, lora, context.work / ADAPTER, base="")
        write_examples(context.work / "examples" / "adapt_clip", _examples(new, scores, seed))
    return _results(context, new, scores, old, old_scores) | {"clip_loss": loss}


def _zero_shot(
    clip: Clip, classes: Classes, templates: list[str], context: RunContext, also: Sequence[str] = ()
) -> Embeddings:
    """Scores (n, classes) of the test pictures, among the classes and whatever else is in `also`."""
    head = class_embeddings(clip, [*classes.words, *also], templates)
    return embed_pictures(clip, classes.test, context.runtime) @ head.T


def few_shot(samples: Samples, label: str, shots: int) -> Samples:
    """The first `shots` samples of each class, in the pool's order.

    Raises:
        ConfigError: a class has fewer.
    """
    taken: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(map(str, samples.field(label))):
        taken[name].append(row)
    for name, rows in taken.items():
        if len(rows) < shots:
            raise ConfigError(f"{name} has {len(rows)} pictures; lower `shots` ({shots}) or give more pictures")
    kept = sorted(row for rows in taken.values() for row in rows[:shots])
    return Samples(
        samples.pool,
        [samples.positions[row] for row in kept],
        [samples.captions[row] for row in kept],
        [samples.meta[row] for row in kept],
    )


def _train(
    config: AdaptClipConfig,
    context: RunContext,
    model: CLIP,
    new: Classes,
    old: Classes | None,
    templates: list[str],
) -> float:
    """Fit the adapters; the shots are kept as shards in the artifact, so that what was learnt from is on record.

    Returns:
        The mean loss of the last steps, as the trainer reports it.
    """
    folder = context.work / "shots"
    if context.runtime.is_main:
        raw = [new.shots.pool.get(position) for position in new.shots.positions]
        write_shards([{"__key__": f"{row:05}-{each.key}", **each.members} for row, each in enumerate(raw)], folder)
    barrier(context.runtime.group)
    shots = Pool(folder, name="shots")
    sources = [Source(shots)]
    if old is not None and config.old is not None:
        sources = [Source(shots, 1 - config.old.share), Source(old.shots.pool, config.old.share)]
    classes = [*new.names, *(old.names if old else [])]
    words = [*new.words, *(old.words if old else [])]
    tokenize = tokenizer_of(model.config.text_cfg)
    asked = [each.replace("{}", name) for name in words for each in templates]
    prompts = model.text_model.trimmed(torch.from_numpy(tokenize(asked)))
    index = {name: number for number, name in enumerate(classes)}
    transform = TrainTransform(model.config.vision_cfg.image_size, scale=config.crop_scale)

    def encode(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        return {"image": transform(sample.picture, rng), "label": np.int64(index[str(sample.meta[config.label])])}

    loader = Loader(
        sources,
        batch_size=config.trainer.samples_per_fetch(context.runtime.world_size),
        encode=encode,
        collate=stack,
        seed=context.config.seed,
        rank=context.runtime.rank,
        world_size=context.runtime.world_size,
        cache_bytes=256 << 20,
    )
    classifier = PromptClassifier(model, prompts.unflatten(0, (len(words), len(templates))).to(context.runtime.device))
    result = train(
        config.trainer,
        model=classifier,
        objective=classify,
        loader=loader,
        context=context,
        phase="clip",
        metrics=lambda: data_metrics(loader),
        evaluate=None
        if config.eval is None
        else while_training(config.eval, context, "clip.eval.", config.trainer, lambda live: as_clip(live.clip)),
        param_groups=decay_groups(classifier.named_parameters(), config.trainer.optimizer.weight_decay),
    )
    classifier.eval()
    return result.mean_loss


def _results(
    context: RunContext, new: Classes, scores: dict[str, Floats], old: Classes | None, old_scores: dict[str, Floats]
) -> dict[str, float]:
    """Metrics of the stage; the main rank also writes them as table rows."""
    metrics: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for prefix, part, given in (("clip", new, scores), ("clip_old", old, old_scores)):
        if part is None:
            continue
        clusters = part.target.tolist()  # pictures of one class are right or wrong together
        hits: dict[str, Bools] = {name: top_k_hits(values, part.target, 1) for name, values in given.items()}
        estimates = {name: mean(values, clusters=clusters) for name, values in hits.items()}
        constant = best_constant(part.target)
        for name, estimate in estimates.items():
            chance = 1 / given[name].shape[1]
            baselines = {"chance": chance, "untrained": None, "constant": constant}
            rows.append({"task": "adapt_clip", "metric": f"{prefix}_{name}", **asdict(estimate), **baselines})
        pairs = {"gain": ("after", "before"), "gain_over_linear_probe": ("after", "linear_probe")}
        if prefix == "clip_old":
            pairs = {"change": ("after", "before")}
        for name, (one, other) in pairs.items():
            estimates[name] = difference(hits[one], hits[other], clusters=clusters)
        metrics[f"{prefix}_constant"] = constant
        for name, estimate in estimates.items():
            metrics[f"{prefix}_{name}"] = estimate.value
            metrics |= {f"{prefix}_{name}_low": estimate.low, f"{prefix}_{name}_high": estimate.high}
    if context.runtime.is_main:
        write_atomic(context.work / RESULTS, json.dumps({"rows": rows}, indent=1) + "\n")
    return metrics


def _examples(new: Classes, scores: dict[str, Floats], seed: int) -> list[Example]:
    """Test pictures with what they were called before and after; half of them where that turned right or wrong."""
    named = {name: [new.names[i] for i in scores[name].argmax(1)] for name in ("before", "after", "linear_probe")}
    hits = {name: top_k_hits(scores[name], new.target, 1) for name in ("before", "after")}
    order = np.random.default_rng(seed).permutation(len(new.target)).tolist()
    changed = [row for row in order if hits["before"][row] != hits["after"][row]][: NUM_EXAMPLES // 2]
    others = [row for row in order if row not in changed][: NUM_EXAMPLES - len(changed)]
    return [
        Example(
            [new.test.picture(row)],
            bool(hits["after"][row]),
            {
                "is": new.names[new.target[row]],
                "before": named["before"][row],
                "after": named["after"][row],
                "linear probe": named["linear_probe"][row],
            },
        )
        for row in [*changed, *others]
    ]
