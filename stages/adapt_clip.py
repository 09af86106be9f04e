"""Teach a CLIP new names from a few pictures each: LoRA, against zero-shot and a linear probe on the same pictures.

The part of the `adapt` stage that is about CLIPs; `stages/adapt.py` runs it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mmfoundry.data.loader import Loader, Source, stack
from mmfoundry.data.reader import Pool
from mmfoundry.data.sample import Sample
from mmfoundry.data.shards import write_shards
from mmfoundry.data.transforms import TrainTransform
from mmfoundry.evals.embed import embed_pictures
from mmfoundry.evals.linear_probe import probe_scores
from mmfoundry.evals.metrics import Bools, Estimate, Floats, Ints, best_constant, difference, mean, top_k_hits
from mmfoundry.evals.samples import Samples, class_indices, select
from mmfoundry.evals.task import Example
from mmfoundry.evals.zero_shot import class_embeddings, load_templates
from mmfoundry.models.adapters.lora import LoraSettings, add_lora, save_lora
from mmfoundry.models.clip import CLIP
from mmfoundry.models.interop.load import load_any_clip
from mmfoundry.pipeline.artifact import write_atomic
from mmfoundry.pipeline.config import ArtifactRef, Config
from mmfoundry.pipeline.distributed import barrier
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.stage import RunContext
from mmfoundry.pipeline.trainer import TrainerConfig, train
from mmfoundry.stages.eval import as_clip, write_examples

ADAPTER = "clip-lora"  # folder of the adapter in the artifact, in peft's format
BLOCKS = "vision_model.encoder.layers"  # transformers' names, so the adapter loads on CLIPModel
RESULTS = "clip_results.json"
NUM_EXAMPLES = 24


class AdaptClipConfig(Config):
    """Few-shot classification by a CLIP with LoRA; its zero-shot head stays."""

    model: ArtifactRef = Field(
        description="the CLIP to adapt: a pretrain artifact, or a transformers or open_clip folder"
    )
    train: ArtifactRef = Field(description="pictures to learn from; the first `shots` of each class are taken")
    test: ArtifactRef = Field(description="other pictures of the same classes")
    label: str = Field("concept", description="metadata field that holds the class name")
    templates: str = Field("emoji", description="prompts: a file of evals/templates")
    shots: int = Field(8, ge=1, description="pictures of each class to learn from")
    lora: LoraSettings = Field(
        LoraSettings(rank=8, alpha=16, modules=["q_proj", "v_proj", "fc1", "fc2"]),
        description="size and places of the adapters in the vision tower; the text tower stays as it is",
    )
    crop_scale: tuple[float, float] = Field((0.8, 1.0), description="least and greatest share of the area of a crop")
    trainer: TrainerConfig = Field(description="batch size, steps, optimizer, schedule, checkpoints")


class PromptClassifier(nn.Module):
    """A CLIP as classifier: logits are scaled cosines between a picture and fixed class embeddings."""

    class_cD: Tensor  # noqa: N815  (shape suffix)

    def __init__(self, clip: CLIP, class_cD: Tensor):
        """`class_cD`: (classes, D), L2-normalised: the zero-shot head."""
        super().__init__()
        self.clip = clip
        self.register_buffer("class_cD", class_cD, persistent=False)

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (b, classes) of `image`, (b, 3, side, side) uint8."""
        image_bD = self.clip.encode_image(self.clip.pixels(batch["image"]))
        return self.clip.scale() * image_bD @ self.class_cD.T


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
        clip_before (zero-shot), clip_after, clip_linear_probe (on the same shots), and the paired differences clip_gain
        (after - before) and clip_gain_over_linear_probe; each with `_low` and `_high` (95%); clip_constant.

    Raises:
        ConfigError: a class has fewer pictures than `shots`, or the two sets have different classes.
    """
    shots = few_shot(select(Pool(context.resolve(config.train)), {}), config.label, config.shots)
    test = select(Pool(context.resolve(config.test)), {})
    names, target = class_indices([str(label) for label in test.field(config.label)])
    shot_names, shot_target = class_indices([str(label) for label in shots.field(config.label)])
    if shot_names != names:
        odd = sorted(set(names) ^ set(shot_names))
        raise ConfigError(f"train and test have different classes: only one of them has {', '.join(odd[:5])}")
    templates = load_templates(config.templates)
    model = load_any_clip(context.resolve(config.model)).to(context.runtime.device)
    clip = as_clip(model)
    head = class_embeddings(clip, _words(shots, config.label, names), templates)
    seen, unseen = (embed_pictures(clip, part, context.runtime) for part in (shots, test))
    scores = {
        "before": unseen @ head.T,
        "linear_probe": probe_scores(seen, shot_target, unseen, len(names), None, context.config.seed),
    }
    lora = add_lora(model, config.lora, BLOCKS, context.config.seed)
    _train(config, context, PromptClassifier(model, torch.from_numpy(head).to(context.runtime.device)), shots, names)
    scores["after"] = embed_pictures(clip, test, context.runtime) @ head.T
    if context.runtime.is_main:
        save_lora(model, lora, context.work / ADAPTER, base="")
    hits = {name: top_k_hits(values, target, 1) for name, values in scores.items()}
    return _results(config, context, Measured(names, target, scores, hits, test))


def few_shot(samples: Samples, label: str, shots: int) -> Samples:
    """The first `shots` samples of each class, in the pool's order.

    Raises:
        ConfigError: a class has fewer.
    """
    taken: dict[str, int] = defaultdict(int)
    rows = []
    for row, name in enumerate(map(str, samples.field(label))):
        taken[name] += 1
        if taken[name] <= shots:
            rows.append(row)
    few = [name for name, count in taken.items() if count < shots]
    if few:
        raise ConfigError(f"{few[0]} has {taken[few[0]]} pictures; lower `shots` ({shots}) or give more pictures")
    return Samples(
        samples.pool,
        [samples.positions[row] for row in rows],
        [samples.captions[row] for row in rows],
        [samples.meta[row] for row in rows],
    )


def _words(samples: Samples, label: str, names: list[str]) -> list[str]:
    """What stands for each class in its prompts: the first caption of its first picture, or its label."""
    words: dict[str, str] = {}
    for name, captions in zip(map(str, samples.field(label)), samples.captions, strict=True):
        words.setdefault(name, captions[0] if captions else name)
    return [words[name] for name in names]


def _train(
    config: AdaptClipConfig, context: RunContext, model: PromptClassifier, shots: Samples, names: list[str]
) -> None:
    """Fit the adapters to the shots, which are kept as shards in the artifact: what was learnt from is on record."""
    folder = context.work / "shots"
    if context.runtime.is_main:
        raw = [shots.pool.get(position) for position in shots.positions]
        write_shards([{"__key__": f"{row:05}-{each.key}", **each.members} for row, each in enumerate(raw)], folder)
    barrier(context.runtime.group)
    transform = TrainTransform(model.clip.config.vision_cfg.image_size, scale=config.crop_scale)
    index = {name: number for number, name in enumerate(names)}

    def encode(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        return {"image": transform(sample.image, rng), "label": np.int64(index[str(sample.meta[config.label])])}

    loader = Loader(
        [Source(folder)],
        batch_size=config.trainer.samples_per_fetch(context.runtime.world_size),
        encode=encode,
        collate=stack,
        seed=context.config.seed,
        rank=context.runtime.rank,
        world_size=context.runtime.world_size,
        cache_bytes=256 << 20,
    )
    train(config.trainer, model=model, objective=classify, loader=loader, context=context, phase="clip")
    model.eval()


@dataclass(frozen=True)
class Measured:
    """Scores (n, classes) and top-1 hits (n,) of each method on the test pictures."""

    names: list[str]
    target: Ints
    scores: dict[str, Floats]
    hits: dict[str, Bools]
    test: Samples


def _results(config: AdaptClipConfig, context: RunContext, measured: Measured) -> dict[str, float]:
    """Metrics of the stage; the main rank also writes them with the table's baselines, and examples."""
    clusters = measured.test.field(config.label)  # pictures of one concept are right or wrong together
    hits = measured.hits
    estimates: dict[str, Estimate] = {name: mean(hits[name], clusters=clusters) for name in hits}
    estimates["gain"] = difference(hits["after"], hits["before"], clusters=clusters)
    estimates["gain_over_linear_probe"] = difference(hits["after"], hits["linear_probe"], clusters=clusters)
    metrics = {f"clip_{name}": estimate.value for name, estimate in estimates.items()}
    for name, estimate in estimates.items():
        metrics |= {f"clip_{name}_low": estimate.low, f"clip_{name}_high": estimate.high}
    metrics["clip_constant"] = best_constant(measured.target)
    if context.runtime.is_main:
        baselines = {"chance": 1 / len(measured.names), "untrained": None, "constant": metrics["clip_constant"]}
        rows = [
            {"task": "adapt_clip", "metric": f"clip_{name}", **asdict(estimate), **baselines}
            for name, estimate in estimates.items()
            if name in hits
        ]
        write_atomic(context.work / RESULTS, json.dumps({"rows": rows}, indent=1) + "\n")
        write_examples(context.work / "examples" / "adapt_clip", _examples(measured, context.config.seed))
    return metrics


def _examples(measured: Measured, seed: int) -> list[Example]:
    """Test pictures with what they were called before and after; half of them where the two differ."""
    named = {name: [measured.names[i] for i in scores.argmax(1)] for name, scores in measured.scores.items()}
    order = np.random.default_rng(seed).permutation(len(measured.target)).tolist()
    changed = [row for row in order if measured.hits["before"][row] != measured.hits["after"][row]][: NUM_EXAMPLES // 2]
    others = [row for row in order if row not in changed][: NUM_EXAMPLES - len(changed)]
    return [
        Example(
            [measured.test.picture(row)],
            bool(measured.hits["after"][row]),
            {
                "is": measured.names[measured.target[row]],
                "before": named["before"][row],
                "after": named["after"][row],
                "linear probe": named["linear_probe"][row],
            },
        )
        for row in [*changed, *others]
    ]
