"""stages/adapt.py, the part about vision-language models: a new question type is learnt, measured and saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfoundry.data.reader import Pool
from mmfoundry.evals.questions import ask, read_questions
from mmfoundry.evals.samples import select
from mmfoundry.models.adapters.lora import load_lora
from mmfoundry.models.vlm_io import load_vlm
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import Runtime, init_runtime
from mmfoundry.pipeline.errors import ConfigError
from mmfoundry.pipeline.stage import run_stage, work_folder
from mmfoundry.stages import adapt_vlm
from mmfoundry.stages.adapt import STAGE, AdaptConfig
from mmfoundry.stages.answering import answerer, load_answerer
from mmfoundry.stages.instruct import STAGE as INSTRUCT
from mmfoundry.stages.instruct import InstructConfig
from tests.stages.vlm_parts import instruct_tree, make_parts, trainer


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_parts(tmp_path_factory.mktemp("parts"))
    run_stage(INSTRUCT, parse(InstructConfig, instruct_tree(folder)), folder / "instruct", init_runtime())
    return folder


def tree(parts: Path, **changes: Any) -> dict[str, Any]:
    vlm: dict[str, Any] = {
        "model": str(parts / "instruct"),
        "data": [{"path": str(parts / "scenes/train")}],
        "test": str(parts / "scenes/train"),  # that it learns is to be seen; a model this small does not generalise
        "new_types": ["category"],
        "old_types": {"count": 1, "presence": 3},
        "per_type": 20,
        "lora": {"rank": 8},
        "merge": True,
        "trainer": trainer(40),
    }
    return {"seed": 2, "vlm": vlm | changes}


@pytest.fixture(scope="module")
def adapted(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run_stage(STAGE, parse(AdaptConfig, tree(parts)), tmp_path_factory.mktemp("adapt") / "adapt", init_runtime())


def test_learns_and_reports(adapted: Artifact) -> None:
    metrics = adapted.manifest.metrics
    assert metrics["vlm_before"] < 0.2
    assert metrics["vlm_after"] > metrics["vlm_constant"]
    assert metrics["vlm_gain"] == pytest.approx(metrics["vlm_after"] - metrics["vlm_before"])
    assert 0 < metrics["vlm_gain_low"] <= metrics["vlm_gain"] <= metrics["vlm_gain_high"]
    assert metrics["vlm_category_after"] == metrics["vlm_after"]
    assert {"vlm_old_before", "vlm_old_after", "vlm_old_change", "vlm_count_after", "vlm_presence_before"} <= {*metrics}
    rows = json.loads((adapted.path / "vlm_results.json").read_text())["rows"]
    assert [row["metric"] for row in rows] == ["vlm_before", "vlm_after", "vlm_old_before", "vlm_old_after"]
    assert (adapted.path / "examples" / "adapt_vlm" / "examples.json").is_file()
    assert not (adapted.path / "vlm_before.json").exists()


def test_adapter_and_merged_model_answer_alike(adapted: Artifact, parts: Path) -> None:
    samples = select(Pool(parts / "scenes/train"), {}, limit=6)
    questions = read_questions(samples, ["category"])
    model, text = load_vlm(parts / "instruct")
    load_lora(model, adapted.path / "vlm-lora")
    on_top = ask(answerer(model, text), samples, questions, Runtime(), 50)
    merged = ask(load_answerer(adapted.path / "vlm", torch.device("cpu")), samples, questions, Runtime(), 50)
    assert on_top == merged
    base = ask(load_answerer(parts / "instruct", torch.device("cpu")), samples, questions, Runtime(), 50)
    assert base != merged


def test_cut_off_run_does_not_ask_again(
    adapted: Artifact, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopError(Exception):
        pass

    def stop(*args: Any, **options: Any) -> None:
        raise StopError

    config = parse(AdaptConfig, tree(parts))
    with monkeypatch.context() as patch:
        patch.setattr(adapt_vlm, "save_lora", stop)
        with pytest.raises(StopError):
            run_stage(STAGE, config, tmp_path / "adapt", init_runtime())
    assert (work_folder(tmp_path / "adapt") / "vlm_before.json").is_file()
    calls = []
    real = adapt_vlm.ask
    monkeypatch.setattr(adapt_vlm, "ask", lambda *args: calls.append(args) or real(*args))
    again = run_stage(STAGE, config, tmp_path / "adapt", init_runtime())
    assert len(calls) == 1  # after; the answers from before were kept
    assert (
        again.manifest.files["vlm-lora/adapter_model.safetensors"]
        == (adapted.manifest.files["vlm-lora/adapter_model.safetensors"])
    )
    first, second = dict(adapted.manifest.metrics), dict(again.manifest.metrics)
    for metrics in (first, second):
        metrics.pop("vlm_samples_per_second")
    assert first == second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"old_types": {"category": 1}}, "category is in new_types and in old_types"),
        ({"old_types": {}}, "old_share is above 0"),
        ({"old_types": {"count": 0}}, "vlm.old_types.count"),
    ],
)
def test_types_that_do_not_fit(parts: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(AdaptConfig, tree(parts, **changes))


def test_nothing_to_adapt() -> None:
    with pytest.raises(ConfigError, match="give clip, vlm, or both"):
        parse(AdaptConfig, {})


def test_shares_of_what_is_learnt_from(parts: Path) -> None:
    config = parse(AdaptConfig, tree(parts, old_types={"count": 1, "presence": 3}, old_share=0.4)).vlm
    assert config is not None
    assert config.shares() == pytest.approx({"category": 0.6, "count": 0.1, "presence": 0.3})
