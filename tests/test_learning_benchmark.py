"""The studies of learning: their smallest runs, and what their tables say of numbers that are known."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from mmfoundry.models import text
from mmfoundry.models.clip import CLIP, ClipConfig
from mmfoundry.models.io import load_clip, save_clip
from tests.scripts import BENCHMARKS, load_script

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 32},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def learning() -> ModuleType:
    return load_script("learning")


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_script("study")


def smaller_recipe(folder: Path) -> Path:
    """configs/dfn.yaml with a tiny model and batch."""
    recipe = yaml.safe_load((BENCHMARKS.parent / "configs" / "dfn.yaml").read_text())
    for entry in ("network", "before"):
        recipe[entry]["model"] = TINY
        recipe[entry]["trainer"]["train_batch_size"] = 8
    path = folder / "dfn.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_the_study_of_learning_runs_and_reports(
    learning: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(learning, "RECIPES", [learning.RECIPES[0], smaller_recipe(tmp_path)])
    command = ["learning.py", "--output", str(tmp_path / "out"), "--arms", "uniform soup", "info_nce, 16 numbers"]
    monkeypatch.setattr(sys, "argv", [*command, "--quick", "--seeds", "0", "1", "--json", str(tmp_path / "rows.json")])
    learning.main()
    assert "1 trainings, 2 steps, 3 evaluations" in capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    arms = ["info_nce, 16 numbers", "uniform soup"]
    assert [row["work"] for row in rows] == [f"{arm}: {metric}" for arm in arms for metric in learning.METRICS]
    monkeypatch.setattr(sys, "argv", [*command, "--report-only"])
    learning.main()
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    (cells,) = [cells for cells in lines if cells[0] == "| info_nce"]
    assert cells[1] == "1"  # seed; of the second nothing is there
    assert float(cells[2]) > 0
    (cells,) = [cells for cells in lines if cells[:2] == ["| uniform soup", "1"]]
    assert cells[2] == ""


def test_filtering_pays_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("filtering_pays")
    monkeypatch.setattr(script, "RECIPE", smaller_recipe(tmp_path))
    monkeypatch.setattr(script, "POOL", str(BENCHMARKS.parent / "data" / "samples" / "pool-00000.tar"))
    monkeypatch.setattr(sys, "argv", ["filtering_pays.py", "--quick", "--json", str(tmp_path / "rows.json")])
    script.main()
    rows = json.loads((tmp_path / "rows.json").read_text())
    arms = ["basic", "rules", "rules, then DFN"]
    assert [row["work"] for row in rows] == [f"{arm}: {metric}" for arm in arms for metric in script.METRICS]
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    pairs = [int(cells[1]) for cells in table[2:6]]
    assert pairs[0] > pairs[1] > pairs[2] > pairs[3] > 0


def test_the_best_rate_is_chosen(learning: ModuleType) -> None:
    assert learning.best_rate({1.0: 0.1, 2.0: 0.3, 3.0: 0.2}) == 2.0
    assert learning.best_rate({2.0: 0.3, 1.0: 0.3}) == 1.0


def test_a_pause_does_not_count(learning: ModuleType, tmp_path: Path) -> None:
    cpu, wall = [0.0, 1.0, 2.0, 5.0, 6.0, 7.0], [0.0, 2.0, 4.0, 600.0, 602.0, 604.0]
    lines = [{"step": at, "clock/cpu_s": c, "clock/wall_s": w} for at, (c, w) in enumerate(zip(cpu, wall, strict=True))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert learning.step_cost(tmp_path) == {"cpu_s": 1.0, "wall_s": 2.0}


def test_padded_captions_have_the_same_features(learning: ModuleType) -> None:
    model = CLIP.from_seed(ClipConfig.model_validate(TINY), 0)
    tokens = torch.tensor([[49406, 5, 49407, 0], [49406, 49407, 0, 0]])
    lengths: list[int] = []
    model.text_model.embeddings.register_forward_hook(lambda *seen: lengths.append(seen[2].shape[1]))
    trimmed, trim = model.encode_text(tokens), text.trim
    with learning.padded_captions(16):
        padded = model.encode_text(tokens)
    assert lengths == [3, 16]
    assert text.trim is trim
    torch.testing.assert_close(padded, trimmed)


def test_cut_embeddings_are_the_first_numbers(learning: ModuleType, tmp_path: Path) -> None:
    model = CLIP.from_seed(ClipConfig.model_validate(TINY), 0)
    save_clip(model, tmp_path / "whole")
    learning.cut_embeddings(tmp_path / "whole", 8, tmp_path / "cut")
    tokens = torch.tensor([[49406, 5, 49407]])
    whole, cut = (load_clip(tmp_path / name).encode_text(tokens) for name in ("whole", "cut"))
    torch.testing.assert_close(cut, torch.nn.functional.normalize(whole[:, :8], dim=1))


def test_tables_over_seeds(study: ModuleType) -> None:
    results = {"base": {0: {"m": 0.1}, 1: {"m": 0.3}}, "arm": {1: {"m": 0.25}}}
    assert study.table(results, {"m": "M"}, {"seeds": {"arm": "1"}}).splitlines() == [
        "| arm | seeds | M |",
        "| --- | --- | --- |",
        "| base |  | 20.0 (10.0 to 30.0) |",
        "| arm | 1 | 25.0 |",
    ]
    assert study.gains(results, "base", {"m": "M"}).splitlines()[2:] == ["| arm | -5.0 (-5.0) |"]
    assert study.gain_rows(results, "base", ["m"]) == [
        {"work": "arm: m", "ours": 0.25, "peer": 0.3, "unit": "share", "ratio": 0.25 / 0.3}
    ]


def test_what_the_arms_change(learning: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: dict[str, Any] = {}
    monkeypatch.setattr("study.run_stage", lambda stage, config, folder, runtime: ran.update({folder.name: config}))
    each = learning.Learning(tmp_path, quick=True)
    for arm in learning.ARMS:
        if not arm.width:
            each.measure(arm, seed=7)
    trained = {name.removeprefix("train-"): config for name, config in ran.items() if name.startswith("train-")}
    assert list(trained) == [arm.place for arm in learning.ARMS if not arm.of]
    base = trained.pop("info_nce")
    assert base.seed == 7
    assert ran["eval-uniform-soup"].clip == str(tmp_path / "seed-7" / "train-info_nce" / "soup")
    assert ran["eval-ema-0.98"].clip == str(tmp_path / "seed-7" / "train-ema-0.98" / "ema")
    for name, config in trained.items():
        optimizer = config.trainer.optimizer
        assert optimizer.lr * optimizer.weight_decay == pytest.approx(learning.DECAY)
        assert config.trainer.max_steps == base.trainer.max_steps
        changed = {key for key in type(config).model_fields if getattr(config, key) != getattr(base, key)}
        assert (changed - {"soup", "trainer"} or optimizer != base.trainer.optimizer or config.trainer.ema) or (
            name == "captions-padded-to-77"
        )
        assert optimizer.type == (name if name in learning.RATES else "adamw")
    assert trained["lion"].trainer.optimizer.betas == (0.9, 0.99)  # its own, not the baseline's
    assert trained["distillation"].teachers["base"].clip == str(tmp_path / "seed-7" / "train-info_nce")


def test_rates_are_searched_once(learning: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = learning.Learning(tmp_path, quick=False)
    asked = []

    def measure(arm: Any, seed: int) -> None:
        asked.append((arm.rate, arm.steps, seed))
        folder = tmp_path / f"seed-{seed}" / f"eval-{arm.place}"
        folder.mkdir(parents=True)
        score = 0.5 if arm.rate == 2e-4 else 0.4
        other = {name: 1 - score for name in learning.METRICS}  # the held-out style has no say
        metrics = other | dict.fromkeys(learning.CHOSEN_BY, score)
        (folder / "manifest.json").write_text(json.dumps({"metrics": metrics}))

    monkeypatch.setattr(each, "measure", measure)
    assert each.rate("lion") == each.rate("lion") == 2e-4
    assert asked == [(rate, 150, 3) for rate in (1e-4, 2e-4, 4e-4)]
    assert "lion: 0.0001: 40.0, 0.0002*: 50.0, 0.0004: 40.0" in learning.search_lines(tmp_path)
