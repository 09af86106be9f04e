"""What the stages of vision-language models start from, as tiny as it gets: scenes, a CLIP, a language model."""

from pathlib import Path
from typing import Any

from mmfoundry.models.io import save_clip
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.stage import run_stage
from mmfoundry.stages.scenes import STAGE as SCENES
from mmfoundry.stages.scenes import ScenesConfig
from tests.data.drawn import write_pictures
from tests.models.tiny import tiny_clip
from tests.models.tiny_vlm import TAGS, tiny_language

QUESTIONS = {"count": 1, "where": 2, "presence": 2, "category": 1}


def make_parts(folder: Path) -> Path:
    """`scenes/{train,test}`, `clip`, `language` below `folder`."""
    pictures = write_pictures(folder / "pictures", count=6)
    layout = {"canvas_size": 32, "min_scale": 0.9}
    sets = {
        "train": {"count": 24, "layout": layout, "questions": QUESTIONS},
        "test": {"count": 8, "layout": layout, "questions": QUESTIONS},
    }
    run_stage(SCENES, parse(ScenesConfig, {"pictures": str(pictures), "sets": sets}), folder / "scenes", Runtime())
    save_clip(tiny_clip(), folder / "clip", seed=0)
    language = tiny_language()
    language.model.save_pretrained(folder / "language")
    language.tokenizer.save_pretrained(folder / "language")
    return folder


def trainer(steps: int, batch: int = 8, lr: float = 1e-2, **changes: Any) -> dict[str, Any]:
    return {
        "train_batch_size": batch,
        "max_steps": steps,
        "optimizer": {"lr": lr, "weight_decay": 0.0},
        "logging_steps": 1,
    } | changes


def instruct_tree(parts: Path, **changes: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "seed": 5,
        "clip": str(parts / "clip"),
        "language_model": str(parts / "language"),
        "model": {
            "connector": {"downsample_factor": 2},
            "tiles": {"min_tiles": 4, "max_tiles": 4},
            "image": {"tile_tags": TAGS},
        },
        "align": {"data": [{"path": str(parts / "scenes/train")}], "trainer": trainer(12)},
        "tune": {
            "data": [{"path": str(parts / "scenes/train")}],
            "questions": {"types": {"count": 1, "where": 1, "presence": 1}, "max_questions": 4},
            "lora": {"rank": 8},
            "trainer": trainer(25),
        },
    }
    return tree | changes
