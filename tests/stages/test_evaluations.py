"""stages/evaluations.py: the model in training measured as the `eval` stage measures it, on any number of ranks."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed import ProcessGroup

from mmfoundry.data.shards import write_shards
from mmfoundry.evals.task import Clip
from mmfoundry.models.interop.any_clip import AnyClip
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import init_runtime
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.metrics import read_metrics
from mmfoundry.pipeline.stage import run_stage
from mmfoundry.stages.eval import STAGE as EVAL
from mmfoundry.stages.eval import EvalConfig
from mmfoundry.stages.evaluations import as_clip
from mmfoundry.stages.pretrain import STAGE as PRETRAIN
from mmfoundry.stages.pretrain import PretrainConfig
from tests.ranks import run_ranks

COUNT = 19  # pictures: one rank of two has one more than the other, and so one batch more
BATCH = 3
BEST = "image_to_text_r1"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    generator = np.random.default_rng(0)

    def samples() -> Any:
        for number in range(COUNT):
            file = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(file, "png")
            yield {"__key__": f"{number:04d}", "png": file.getvalue(), "txt": f"picture {number}"}

    write_shards(samples(), folder)
    return folder


def tree(shards: Path, **trainer: Any) -> dict[str, Any]:
    return {
        "data": [{"path": str(shards)}],
        "model": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
            "text_cfg": {"context_length": 12, "width": 16, "heads": 2, "layers": 2},
        },
        "trainer": {"train_batch_size": 8, "max_steps": 6, "optimizer": {"lr": 3e-3}} | trainer,
    }


def evaluation(shards: Path) -> dict[str, Any]:
    task = {"task": "retrieval", "scenes": {"data": "squares"}, "ks": [1, 5]}
    return {"data": {"squares": str(shards)}, "tasks": {"retrieval": task}, "batch_size": BATCH}


def train(group: ProcessGroup | None, output: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of the log."""
    artifact = run_stage(PRETRAIN, parse(PretrainConfig, config), output, init_runtime())
    return [*read_metrics(artifact.path / "metrics.jsonl")]


def measured(lines: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """What was measured at each step."""
    prefix = "eval/"
    found = (
        (line["step"], {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}) for line in lines
    )
    return {step: numbers for step, numbers in found if numbers}


def by_the_eval_stage(clip: Path, shards: Path, output: Path) -> dict[str, float]:
    config = parse(EvalConfig, evaluation(shards) | {"clip": str(clip), "untrained": False})
    return run_stage(EVAL, config, output, init_runtime()).manifest.metrics


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 0), (2, 3)])
def test_the_last_evaluation_is_the_eval_stages(shards: Path, tmp_path: Path, world: int, stage: int) -> None:
    config = tree(shards, eval_steps=3, zero_optimization={"stage": stage}) | {"eval": evaluation(shards)}
    output = tmp_path / "clip"
    lines = run_ranks(train, world, str(output), config)[0] if world > 1 else train(None, str(output), config)
    found = measured(lines)
    assert [*found] == [3, 6]
    expected = by_the_eval_stage(output, shards, tmp_path / "eval")
    assert found[6] == {name: pytest.approx(expected[name]) for name in found[6]}
    assert {BEST, "text_to_image_r5"} <= found[6].keys()
    assert found[3] != found[6]


def test_measuring_changes_nothing_and_tells_the_best(shards: Path, tmp_path: Path) -> None:
    plain = train(None, str(tmp_path / "plain"), tree(shards))
    best = {"metric_for_best_model": BEST, "greater_is_better": True, "load_best_model_at_end": True}
    config = tree(shards, eval_steps=1, save_steps=0, keep_checkpoints=1, **best) | {"eval": evaluation(shards)}
    lines = train(None, str(tmp_path / "measured"), config)
    assert [line["loss"] for line in lines if "loss" in line] == [line["loss"] for line in plain]
    found = {step: numbers[BEST] for step, numbers in measured(lines).items()}
    assert len(found) == 6
    assert max(found.values()) > found[6]  # else the last would do as well
    assert by_the_eval_stage(tmp_path / "measured", shards, tmp_path / "eval")[BEST] == pytest.approx(
        max(found.values())
    )


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 1), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_the_average_is_measured_beside_the_weights(shards: Path, tmp_path: Path, world: int, stage: int) -> None:
    more = {"eval_steps": 3, "ema": {"decay": 0.6}, "zero_optimization": {"stage": stage}}
    config = tree(shards, **more) | {"eval": evaluation(shards)}
    output = tmp_path / "clip"
    lines = run_ranks(train, world, str(output), config)[0] if world > 1 else train(None, str(output), config)
    last = measured(lines)[6]
    for suffix, folder in (("", output), ("/ema", output / "ema")):
        expected = by_the_eval_stage(folder, shards, tmp_path / f"eval{len(suffix)}")
        found = {
            name.removesuffix("/ema"): value for name, value in last.items() if name.endswith("/ema") == bool(suffix)
        }
        assert found == {name: pytest.approx(expected[name]) for name in found}
        assert BEST in found
    assert any(last[f"{name}/ema"] != value for name, value in last.items() if not name.endswith("/ema"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_computes_as_it_is_trained_and_numbers_are_wide(
    precision: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[bool]] = {"encoding": [], "elsewhere": []}

    def watched(model: AnyClip) -> Clip:
        seen["elsewhere"].append(torch.is_autocast_enabled("cpu"))
        shown = as_clip(model)

        def encode_image(pictures: torch.Tensor) -> torch.Tensor:
            seen["encoding"].append(torch.is_autocast_enabled("cpu"))
            found = shown.encode_image(pictures)
            assert found.dtype == torch.float32
            return found

        return dataclasses.replace(shown, encode_image=encode_image)

    monkeypatch.setattr("mmfoundry.stages.pretrain.as_clip", watched)
    config = tree(shards, max_steps=1, eval_steps=1, precision=precision) | {"eval": evaluation(shards)}
    train(None, str(tmp_path / "clip"), config)
    assert seen == {"encoding": [precision == "bf16"] * 7, "elsewhere": [False]}


def test_steps_and_evaluations_go_together(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval and trainer\.eval_steps go together"):
        parse(PretrainConfig, tree(shards, eval_steps=3))
    with pytest.raises(ConfigError, match=r"eval and trainer\.eval_steps go together"):
        parse(PretrainConfig, tree(shards) | {"eval": evaluation(shards)})
    other = evaluation(shards) | {"data": {"circles": str(shards)}}
    with pytest.raises(ConfigError, match=r"eval.*data set 'squares' is not in `data`; it has \['circles'\]"):
        parse(PretrainConfig, tree(shards, eval_steps=3) | {"eval": other})
