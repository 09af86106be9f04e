"""stages/instruct.py: align, tune, merge, resume, and the same on two ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import ProcessGroup

from mmfoundry.models.vlm_io import load_vlm, untrained_vlm
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import init_runtime
from mmfoundry.pipeline.metrics import read_metrics
from mmfoundry.pipeline.stage import run_stage, work_folder
from mmfoundry.stages import instruct
from mmfoundry.stages.answering import answerer, load_answerer
from mmfoundry.stages.instruct import STAGE, InstructConfig
from tests.models.tiny_vlm import picture
from tests.ranks import run_ranks
from tests.stages.vlm_parts import instruct_tree, make_parts, trainer


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def artifact(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    config = parse(InstructConfig, instruct_tree(parts))
    return run_stage(STAGE, config, tmp_path_factory.mktemp("instruct") / "instruct", init_runtime())


def losses(folder: Path, phase: str) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line.get("phase") == phase]


def test_both_phases_learn(artifact: Artifact) -> None:
    align, tune = losses(artifact.path, "align"), losses(artifact.path, "tune")
    assert (len(align), len(tune)) == (12, 25)
    assert align[-1] < 0.6 * align[0]
    assert tune[-1] < 0.5 * tune[0]
    metrics = artifact.manifest.metrics
    assert metrics["loss"] == pytest.approx(tune[-1])
    assert metrics["align_loss"] == pytest.approx(align[-1])
    assert metrics["trainable_parameters"] > 1000


def test_what_is_left_is_a_plain_model(artifact: Artifact, parts: Path) -> None:
    model, text = load_vlm(artifact.path)
    state = load_file(artifact.path / "model.safetensors")
    assert not [name for name in state if "lora" in name]
    tower = load_file(parts / "clip" / "model.safetensors")
    for name, value in model.model.vision_tower.state_dict().items():  # frozen
        assert torch.equal(value, tower[f"vision_model.{name}"])
    start, _ = untrained_vlm(artifact.path)
    before, after = (m.model.language_model.layers[0].mlp.up_proj.weight for m in (start, model))
    assert not torch.equal(before, after)
    assert torch.equal(before, load_file(parts / "language" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(start.lm_head.weight, model.lm_head.weight)  # frozen
    replies = answerer(model, text)([picture(1), picture(2)], ["How many?", "Where?", "How many?"], [0, 1, 0])
    assert len(replies) == 3
    assert replies[0] == replies[2]
    again = load_answerer(artifact.path, torch.device("cpu"))
    assert again([picture(2)], ["Where?"], [0]) == [replies[1]]


class _Stop(Exception):
    pass


@pytest.mark.parametrize("point", ["tune", "merge_lora"])
def test_cut_off_between_phases(
    artifact: Artifact, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise _Stop

    config = parse(InstructConfig, instruct_tree(parts))
    with monkeypatch.context() as patch:
        patch.setattr(instruct, point, stop)
        with pytest.raises(_Stop):
            run_stage(STAGE, config, tmp_path / "again", init_runtime())
    done = work_folder(tmp_path / "again") / "checkpoints"
    assert sorted(path.name for path in done.iterdir()) == (["align"] if point == "tune" else ["align", "tune"])
    again = run_stage(STAGE, config, tmp_path / "again", init_runtime())
    for phase in ("align", "tune"):
        assert losses(again.path, phase) == losses(artifact.path, phase)
    assert again.manifest.files["model.safetensors"] == artifact.manifest.files["model.safetensors"]


def tune_curve(group: ProcessGroup | None, tree: dict[str, Any], folder: str) -> list[list[float]]:
    made = run_stage(STAGE, parse(InstructConfig, tree), folder, init_runtime())
    return [losses(made.path, "align"), losses(made.path, "tune")]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}},
        {"zero_optimization": {"stage": 3}},
    ],
)
def test_ranks_agree_with_one_process(parts: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    tree = instruct_tree(parts)
    for phase, steps in (("align", 4), ("tune", 6)):
        tree[phase] = tree[phase] | {"trainer": trainer(steps, lr=1e-3)}
    alone = tune_curve(None, tree, str(tmp_path / "alone"))
    for phase in ("align", "tune"):
        tree[phase]["trainer"] |= changes
    together = run_ranks(tune_curve, 2, tree, str(tmp_path / "together"))[0]
    # fp32; answers differ in length, so a mean over a rank's own tokens would be off by far more
    for ours, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=2e-4)


def test_mlp_connector_without_align_and_lora(parts: Path, tmp_path: Path) -> None:
    tree = instruct_tree(parts, align=None, model={"connector": {"type": "mlp", "downsample_factor": 1}})
    tree["tune"] = tree["tune"] | {"lora": None, "trainer": trainer(3)}
    made = run_stage(STAGE, parse(InstructConfig, tree), tmp_path / "mlp", init_runtime())
    record = json.loads((made.path / "config.json").read_text())
    assert record["model"]["connector"]["type"] == "mlp"
    assert "align_loss" not in made.manifest.metrics
    model, _ = load_vlm(made.path)
    assert made.manifest.metrics["trainable_parameters"] == sum(
        weight.numel() for weight in model.model.multi_modal_projector.parameters()
    )
