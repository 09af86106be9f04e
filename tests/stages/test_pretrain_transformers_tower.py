"""pretrain, eval and release of open_clip's models with a text tower, or a tokenizer, of transformers."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest

from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import Runtime, init_runtime
from mmfoundry.pipeline.metrics import read_metrics
from mmfoundry.pipeline.stage import run_stage
from mmfoundry.stages.eval import STAGE as EVAL
from mmfoundry.stages.eval import EvalConfig
from mmfoundry.stages.pretrain import STAGE, PretrainConfig
from mmfoundry.stages.release import STAGE as RELEASE
from mmfoundry.stages.release import ReleaseConfig
from tests.models.test_open_clip_transformers import KINDS
from tests.models.test_open_clip_transformers import tree as model_tree
from tests.ranks import run_ranks
from tests.stages.test_pretrain_open_clip import logged, shards  # noqa: F401  (a fixture)


def config(kind: str, shards: Path, folder: Path, **trainer: Any) -> dict[str, Any]:  # noqa: F811
    optimizer = {"lr": 1e-2, "weight_decay": 0.0}
    return {
        "seed": 3,
        "data": [{"path": str(shards)}],
        "model": {"open_clip": model_tree(kind, folder)},
        "trainer": {"train_batch_size": 12, "max_steps": 3, "optimizer": optimizer, **trainer},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_is_measured_and_released(kind: str, shards: Path, tmp_path: Path) -> None:  # noqa: F811
    asked = config(kind, shards, tmp_path / "source", max_steps=60, scheduler={"warmup_steps": 5})
    done = run_stage(STAGE, parse(PretrainConfig, asked), tmp_path / "pretrain", init_runtime())
    lines = list(read_metrics(done.path / "metrics.jsonl"))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5

    task = {"task": "zero_shot", "pictures": {"data": "squares"}, "label": "name", "templates": ["{}"], "top": [1]}
    measure = {"clip": str(done.path), "data": {"squares": str(shards)}, "tasks": {"colours": task}}
    measured = run_stage(EVAL, parse(EvalConfig, measure), tmp_path / "eval", init_runtime())
    rows = {row["metric"]: row for row in json.loads((measured.path / "results.json").read_text())["rows"]}
    assert rows["colours"]["value"] == 1 > rows["colours"]["untrained"]

    card = {"license": "apache-2.0"}
    wanted = {"name": "small", "clip": str(done.path), "clip_formats": ["open_clip"], "card": card}
    released = run_stage(RELEASE, parse(ReleaseConfig, wanted), tmp_path / "release", Runtime())
    assert released.manifest.metrics["max_difference"] < 1e-5
    place = f"local-dir:{released.path / 'clip-open_clip'}"
    open_clip.create_model(place, require_pretrained=True)
    assert open_clip.get_tokenizer(place)(["a red square"])[0, 0] == 2  # [CLS]


def test_ranks_give_the_joint_losses(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    asked = config("tower", shards, tmp_path / "source")
    asked["model"]["open_clip"]["text_cfg"]["hf_model_pretrained"] = False
    asked["trainer"]["zero_optimization"] = {"stage": 2}
    # dropout draws per rank, so that ranks agree with one process only without it
    file = tmp_path / "source" / "config.json"
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | still))
    joint = [line["loss"] for line in logged(None, str(tmp_path / "one"), asked)]
    for found in run_ranks(logged, 2, str(tmp_path / "two"), asked):
        assert [line["loss"] for line in found] == pytest.approx(joint, rel=1e-5)
