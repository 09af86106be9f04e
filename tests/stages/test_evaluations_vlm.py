"""stages/evaluations.py in `instruct` and `adapt`: the live model measured as the `eval` stage measures it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from mmfoundry.data.named_tiles import NamedTiles, all_names, collate
from mmfoundry.data.reader import Pool
from mmfoundry.evals.samples import select
from mmfoundry.models.adapters.lora import load_lora, merge_lora
from mmfoundry.models.aligner import Aligner, AlignmentLoss, name_vectors
from mmfoundry.models.chat import IGNORED
from mmfoundry.models.interop.load import load_any_clip
from mmfoundry.models.io import save_clip
from mmfoundry.models.vlm_io import load_vlm
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import init_runtime
from mmfoundry.pipeline.errors import ConfigError, DamagedInput
from mmfoundry.pipeline.metrics import read_metrics
from mmfoundry.pipeline.stage import run_stage
from mmfoundry.stages import instruct
from mmfoundry.stages.adapt import STAGE as ADAPT
from mmfoundry.stages.adapt import AdaptConfig
from mmfoundry.stages.answering import instruction_encoder, tiles_of
from mmfoundry.stages.eval import STAGE as EVAL
from mmfoundry.stages.eval import EvalConfig
from mmfoundry.stages.instruct import STAGE as INSTRUCT
from mmfoundry.stages.instruct import InstructConfig
from tests.models.tiny import tiny_clip
from tests.models.tiny_vlm import logits_of
from tests.ranks import run_ranks
from tests.stages.vlm_parts import instruct_tree, make_parts, trainer

STAGES = {"instruct": (INSTRUCT, InstructConfig), "adapt": (ADAPT, AdaptConfig), "eval": (EVAL, EvalConfig)}
LOSS = "heldout_loss"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def instructed(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("instructed") / "instruct"
    run(None, "instruct", str(folder), tuned(parts, 6))
    return folder


def run(group: ProcessGroup | None, stage: str, output: str, tree: dict[str, Any]) -> dict[int, dict[str, float]]:
    """What was measured at each step; of the eval stage, its metrics at step 0."""
    which, config = STAGES[stage]
    artifact = run_stage(which, parse(config, tree), output, init_runtime())  # type: ignore[arg-type]  # fits the stage
    if stage == "eval":
        return {0: artifact.manifest.metrics}
    return measured(artifact.path)


def measured(folder: Path) -> dict[int, dict[str, float]]:
    prefix = "eval/"
    found: dict[int, dict[str, float]] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        if numbers := {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}:
            found[line["step"]] = numbers
    return found


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def evaluation(parts: Path, **changes: Any) -> dict[str, Any]:
    """Questions enough that a picture of 6 goes alone: ranks of two have unequally many batches."""
    scenes = {"scenes": {"data": "held"}}
    tasks = {
        "heldout": {"task": "answer_loss", **scenes, "batch_size": 15},
        "vqa": {"task": "vqa", **scenes, "per_type": 6},
        "pope": {"task": "pope", **scenes},
    }
    return {"data": {"held": str(parts / "scenes/test")}, "tasks": tasks} | changes


def tuned(parts: Path, steps: int, evaluated: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    tree = instruct_tree(parts, align=None)
    lora = {"rank": 4, "dropout": 0.2}
    tree["tune"] |= {"trainer": trainer(steps, **changes), "lora": lora}
    return tree | {"tune": tree["tune"] | ({} if evaluated is None else {"eval": evaluated})}


@pytest.mark.parametrize(
    ("world", "stage"),
    [(1, 0), pytest.param(2, 0, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow), (2, 2), (2, 3)],
)
def test_tuning_is_measured_as_by_the_eval_stage(parts: Path, tmp_path: Path, world: int, stage: int) -> None:
    tree = tuned(parts, 4, evaluation(parts), eval_steps=2, zero_optimization={"stage": stage})
    args = ("instruct", str(tmp_path / "vlm"), tree)
    found = run(None, *args) if world == 1 else run_ranks(run, world, *args)[0]
    assert [*found] == [2, 4]
    after = evaluation(parts) | {"vlm": str(tmp_path / "vlm"), "untrained": False}
    expected = run(None, "eval", str(tmp_path / "eval"), after)[0]
    assert found[4].keys() >= {LOSS, "heldout_token_accuracy", "vqa_count", "vqa_where", "pope_f1"}
    # The adapters are beside the weights while they learn, and merged into them in the artifact
    assert found[4] == {name: pytest.approx(expected[name], rel=1e-5) for name in found[4]}
    assert found[2][LOSS] != found[4][LOSS]


def test_held_out_loss_is_that_of_each_answer_alone(instructed: Path, parts: Path, tmp_path: Path) -> None:
    """Bit for bit on any number of ranks; against one plain causal pass a question."""
    tree = evaluation(parts) | {"vlm": str(instructed), "only": ["heldout"]}
    alone = run(None, "eval", str(tmp_path / "alone"), tree)[0]
    assert run_ranks(run, 2, "eval", str(tmp_path / "two"), tree)[0][0] == alone
    model, text = load_vlm(instructed)
    encoder = instruction_encoder(model, text)
    samples = select(Pool(parts / "scenes/test"), {})
    nats, right, count = 0.0, 0, 0
    for row, meta in enumerate(samples.meta):
        tiles = encoder.cut_tiles(samples.picture(row))
        for each in meta["questions"]:
            asked = {"role": "user", "content": each["question"]}
            turns = [asked, {"role": "assistant", "content": each["answer"]}]
            ids, labels = (torch.tensor(part) for part in encoder.conversation(turns, len(tiles)))
            said = labels[1:] != IGNORED
            with torch.no_grad():
                logits = logits_of(model, ids[None], tiles)[0, :-1][said]
            nats += float(F.cross_entropy(logits, ids[1:][said], reduction="sum"))
            right += int((logits.argmax(1) == ids[1:][said]).sum())
            count += len(logits)
    assert alone[LOSS] == pytest.approx(nats / count, rel=1e-5)
    assert alone["heldout_token_accuracy"] == pytest.approx(right / count)
    tree["tasks"]["heldout"]["batch_size"] = 1
    split = run(None, "eval", str(tmp_path / "split"), tree)[0]
    assert split[LOSS] == pytest.approx(alone[LOSS], rel=1e-6)


def test_measuring_changes_nothing_and_tells_the_best(parts: Path, tmp_path: Path) -> None:
    run(None, "instruct", str(tmp_path / "plain"), tuned(parts, 6, lr=0.5))
    best = {"metric_for_best_model": LOSS, "load_best_model_at_end": True, "save_steps": 0, "keep_checkpoints": 1}
    tree = tuned(parts, 6, evaluation(parts), eval_steps=1, lr=0.5, **best)
    found = run(None, "instruct", str(tmp_path / "measured"), tree)
    assert losses(tmp_path / "measured") == losses(tmp_path / "plain")
    least = min(numbers[LOSS] for numbers in found.values())
    assert least < found[6][LOSS]  # else the last would do as well
    after = evaluation(parts, only=["heldout"]) | {"vlm": str(tmp_path / "measured"), "untrained": False}
    assert run(None, "eval", str(tmp_path / "eval"), after)[0][LOSS] == pytest.approx(least, rel=1e-5)


class _Stop(Exception):
    pass


def test_a_run_cut_off_while_it_measures_goes_on(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tuned(parts, 6, evaluation(parts), eval_steps=2, save_steps=3)
    whole = run(None, "instruct", str(tmp_path / "whole"), tree)
    real, calls = instruct.as_vlm, []

    def stopping(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:  # at step 4
            raise _Stop
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(instruct, "as_vlm", stopping)
        with pytest.raises(_Stop):
            run(None, "instruct", str(tmp_path / "cut"), tree)
    assert run(None, "instruct", str(tmp_path / "cut"), tree) == whole
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "cut")) == 6


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 3)])
def test_aligning_is_measured_on_pictures_held_out(parts: Path, tmp_path: Path, world: int, stage: int) -> None:
    tree = tuned(parts, 1)
    tree["tune"]["connector_lr_scale"] = 0  # so that the artifact has the connector as it was aligned
    data, held = str(parts / "scenes/train"), str(parts / "scenes/test")
    align = trainer(4, eval_steps=2, zero_optimization={"stage": stage})
    tree["align"] = {"data": [{"path": data}], "eval": {"data": held, "batch_size": 3}, "trainer": align}
    args = ("instruct", str(tmp_path / "vlm"), tree)
    found = run(None, *args) if world == 1 else run_ranks(run, world, *args)[0]
    assert [*found] == [2, 4]
    assert found[2]["loss"] != found[4]["loss"]
    model, text = load_vlm(tmp_path / "vlm")
    learnt, asked = (select(Pool(parts / f"scenes/{name}"), {}) for name in ("train", "test"))
    names = all_names(learnt.meta, "concept", "nothing")
    encode = NamedTiles(tiles_of(model), {name: i for i, name in enumerate(names)}, "concept", "nothing")
    batch = collate([encode(asked.sample(row), np.random.default_rng(0)) for row in range(len(asked))])
    vectors = name_vectors(model, [text.encode(f" {name}")[0] for name in names])
    with torch.no_grad():
        expected = AlignmentLoss()(Aligner(model, vectors)(batch), batch)
    assert found[4] == {name: pytest.approx(float(value), rel=1e-5) for name, value in expected.items()}


def test_a_name_held_out_that_is_not_learnt_is_named(parts: Path, tmp_path: Path) -> None:
    tree = tuned(parts, 1)
    singles = str(parts / "pictures")
    align = {"data": [{"path": str(parts / "scenes/train")}], "label": "style", "eval": {"data": singles}}
    tree["align"] = align | {"trainer": trainer(1, eval_steps=1)}
    with pytest.raises(DamagedInput, match=r"align\.eval: sample .*an unknown name"):
        run(None, "instruct", str(tmp_path / "vlm"), tree)


def test_adapting_a_vlm_is_measured(instructed: Path, parts: Path, tmp_path: Path) -> None:
    vlm = {
        "model": str(instructed),
        "data": [{"path": str(parts / "scenes/train")}],
        "test": str(parts / "scenes/test"),
        "new_types": ["category"],
        "old_types": {"count": 1},
        "per_type": 4,
        "lora": {"rank": 4},
        "merge": True,
        "eval": evaluation(parts),
        "trainer": trainer(4, eval_steps=4),
    }
    found = run(None, "adapt", str(tmp_path / "adapt"), {"vlm": vlm})
    after = evaluation(parts) | {"vlm": str(tmp_path / "adapt/vlm"), "untrained": False}
    expected = run(None, "eval", str(tmp_path / "eval"), after)[0]
    assert found == {4: {name: pytest.approx(expected[name], rel=1e-5) for name in found[4]}}


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 3)])
def test_adapting_a_clip_is_measured(parts: Path, tmp_path: Path, world: int, stage: int) -> None:
    text = {"context_length": 16, "vocab_size": 49_408, "width": 16, "heads": 2, "layers": 2}
    save_clip(tiny_clip(text_cfg=text), tmp_path / "clip", seed=0)
    retrieval = {"task": "retrieval", "scenes": {"data": "held"}, "ks": [1, 5]}
    pictures = str(parts / "pictures")
    clip = {
        "model": str(tmp_path / "clip"),
        "train": pictures,
        "test": pictures,
        "shots": 1,
        "eval": {"data": {"held": pictures}, "tasks": {"retrieval": retrieval}, "batch_size": 5},
        "trainer": trainer(4, eval_steps=2, zero_optimization={"stage": stage}),
    }
    args = ("adapt", str(tmp_path / "adapt"), {"clip": clip})
    found = run(None, *args) if world == 1 else run_ranks(run, world, *args)[0]
    assert [*found] == [2, 4]
    model = load_any_clip(tmp_path / "clip")
    load_lora(model, tmp_path / "adapt/clip-lora")
    save_clip(merge_lora(model), tmp_path / "adapted", seed=0)  # type: ignore[arg-type]  # the same model
    after = clip["eval"] | {"clip": str(tmp_path / "adapted"), "untrained": False}
    expected = run(None, "eval", str(tmp_path / "eval"), after)[0]
    assert found[4] == {name: pytest.approx(expected[name]) for name in found[4]}


def test_steps_and_evaluations_go_together(parts: Path) -> None:
    for tree in (tuned(parts, 2, eval_steps=1), tuned(parts, 2, evaluation(parts))):
        with pytest.raises(ConfigError, match=r"tune.*eval and trainer\.eval_steps go together"):
            parse(InstructConfig, tree)
    of_clips = evaluation(parts) | {"tasks": {"it": {"task": "retrieval", "scenes": {"data": "held"}}}}
    with pytest.raises(ConfigError, match=r"nothing to measure"):
        parse(InstructConfig, tuned(parts, 2, of_clips, eval_steps=1))
