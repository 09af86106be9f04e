"""A tiny CLIP, vision-language model and adapters as finished artifacts, with measurements, ready to be released.

The stages that would train them are stood in for: what they write is what the real ones write, with random weights.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

from mmfoundry.models.adapters.lora import LoraSettings, add_lora, save_lora
from mmfoundry.models.io import load_clip, save_clip
from mmfoundry.models.vlm_io import load_vlm, save_vlm
from mmfoundry.pipeline.artifact import Artifact, write_atomic
from mmfoundry.pipeline.config import ArtifactRef, Config, StageConfig, parse
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.stage import RunContext, Stage, run_stage
from mmfoundry.stages import adapt_clip, adapt_vlm, instruct
from mmfoundry.stages.eval import STAGE as EVAL
from mmfoundry.stages.eval import EvalConfig
from tests.data.drawn import write_pictures
from tests.models.tiny import tiny_clip
from tests.models.tiny_vlm import tiny_vlm

TEXT = {"context_length": 12, "vocab_size": 49_408, "width": 16, "heads": 2, "layers": 2}
ROW = {
    "task": "adapt",
    "value": 0.5,
    "low": 0.4,
    "high": 0.6,
    "n": 7,
    "chance": 0.1,
    "untrained": None,
    "constant": 0.2,
}


class Adapted(Config):
    """One part of an adapt stage."""

    model: ArtifactRef = Field(description="what was adapted")


class MadeConfig(StageConfig):
    """A stage that is stood in for."""

    data: ArtifactRef | None = Field(None, description="what it was trained on")
    language_model: str = Field("owner/language-model", description="of a vision-language model")
    clip: Adapted | None = Field(None, description="as in an adapt stage")
    vlm: Adapted | None = Field(None, description="as in an adapt stage")


def made(stage: str, output: Path, fill: Callable[[Path], None], **config: Any) -> Path:
    """The artifact of a stage that writes by `fill`."""

    def run(_: MadeConfig, context: RunContext) -> Artifact:
        fill(context.work)
        return context.finish({"clip_gain": 0.25, "clip_gain_low": 0.125, "clip_gain_high": 0.5, "loss": 1.0})

    return run_stage(Stage(stage, MadeConfig, run, ""), parse(MadeConfig, config), output, Runtime()).path


def adapted(model: nn.Module, blocks: str, modules: list[str], folder: Path) -> None:
    """Random adapters of a model that change what it says."""
    config = add_lora(model, LoraSettings(rank=4, modules=modules), blocks, 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    save_lora(model, config, folder, base="")


def make_models(folder: Path) -> Path:
    """`data`, `pretrain`, `instruct`, `adapt`, `eval` below `folder`."""
    pictures = write_pictures(folder / "data", count=6)
    clip = made(
        "pretrain",
        folder / "pretrain",
        lambda work: save_clip(tiny_clip(text_cfg=TEXT), work, seed=0),
        data=str(pictures),
    )
    vlm = made("instruct", folder / "instruct", lambda work: save_vlm(*tiny_vlm(), work), data=str(clip))

    def fill_adapters(work: Path) -> None:
        adapted(load_clip(clip), "vision_model.encoder.layers", ["q_proj", "fc1"], work / adapt_clip.ADAPTER)
        adapted(load_vlm(vlm)[0], instruct.BLOCKS, ["q_proj", "down_proj"], work / adapt_vlm.ADAPTER)
        write_atomic(work / adapt_clip.RESULTS, json.dumps({"rows": [ROW | {"metric": "clip_after"}]}))
        rows = [ROW | {"metric": "vlm_after"}, ROW | {"metric": "heldout_loss", "unit": "nats"}]
        write_atomic(work / adapt_vlm.RESULTS, json.dumps({"rows": rows}))

    made("adapt", folder / "adapt", fill_adapters, clip={"model": str(clip)}, vlm={"model": str(vlm)})
    measure(folder, clip)
    return folder


def measure(folder: Path, clip: Path, name: str = "eval") -> Path:
    """The eval artifact of a CLIP."""
    task = {"task": "zero_shot", "pictures": {"data": "pictures"}, "label": "concept", "templates": "plain", "top": [1]}
    tree = {"clip": str(clip), "data": {"pictures": str(folder / "data")}, "tasks": {"names": task}}
    return run_stage(EVAL, parse(EvalConfig, tree), folder / name, Runtime()).path


def release_tree(models: Path, **changes: Any) -> dict[str, Any]:
    """The config of a release of all of them."""
    tree: dict[str, Any] = {
        "name": "tiny",
        **{name: str(models / source) for name, source in SOURCES.items()},
        "card": {
            "license": "apache-2.0",
            "description": "Random weights: good for nothing.",
            "data": [
                {"name": "Squares", "license": "CC-BY 4.0", "url": "https://example.org", "note": "drawn here"},
                PARENT,
            ],
            "command": "mmfoundry run tiny.yaml",
        },
    }
    return tree | changes


PARENT = {"name": "Parent", "license": "MIT", "used_by": ["vlm"]}
SOURCES = {"clip": "pretrain", "vlm": "instruct", "adapters": "adapt", "eval": "eval"}
