"""Recipes: checked whole before the first stage, run in order, done once, told in few lines."""

import json
from pathlib import Path

import pytest
import yaml

from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import load_yaml, parse
from mmfoundry.pipeline.errors import ConfigError, MissingInput, MmfoundryError, UnknownName
from mmfoundry.pipeline.recipe import Recipe, load_recipe, plan, run_recipe
from tests.pipeline import fake_stages as fakes

RECIPE = """
name: try
seed: 3
count:
  source: {source}
count_more:
  stage: count
  source: {source}/a.txt
  steps: 2
  seed: 9
join:
  parts: ["${{count}}", "${{ count_more }}"]
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.txt").write_text("a ")
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(source=tmp_path / "source"))
    return file


def load(file: Path, *overrides: str) -> Recipe:
    return load_recipe(file, fakes.STAGES, overrides)


def run(file: Path, *overrides: str, **named: object) -> list[str]:
    said: list[str] = []
    run_recipe(load(file, *overrides), say=said.append, **named)  # type: ignore[arg-type]
    return said


def test_stages_run_in_order_and_report_themselves(recipe: Path) -> None:
    reports: list[Path] = []
    said = run(recipe, report=reports.append)
    assert [line.split()[0] for line in said] == [
        "count",
        "count",
        "count_more",
        "count_more",
        "join",
        "join",
        "runs/try:",
    ]
    assert "steps 3, written_now 3" in said[1]
    assert Path("runs/try/join/joined.txt").read_text() == "a 0\na 1\na 2\na 0\na 1\n"
    summary = json.loads(Path("runs/try/summary.json").read_text())
    assert summary["join/files"] == 5
    assert set(summary) == {
        "count/steps", "count/written_now", "count/seconds", "join/files", "join/seconds",
        "count_more/steps", "count_more/written_now", "count_more/seconds",
    }  # fmt: skip
    assert all(isinstance(value, float | int) for value in summary.values())
    assert reports == [Path("runs/try")]


def test_a_second_run_has_nothing_to_do(recipe: Path) -> None:
    run(recipe)
    reports: list[Path] = []
    (said,) = run(recipe, report=reports.append)
    assert said.startswith("runs/try: nothing to do, 3 stages are done")
    assert reports, "the report was missing"
    Path("runs/try/report.html").write_text("<html>")
    (said,) = run(recipe, report=reports.append)
    assert said.endswith("open runs/try/report.html")
    assert len(reports) == 1


def test_the_seed_of_the_recipe_is_the_default_of_its_stages(recipe: Path) -> None:
    assert [entry.config.seed for entry in load(recipe).entries] == [3, 9, 3]
    assert [entry.config.seed for entry in load(recipe, "seed=5", "join.seed=1").entries] == [5, 9, 1]


def test_only_what_depends_on_a_change_runs_again(recipe: Path) -> None:
    run(recipe)
    said = run(recipe, "join.shout=true")
    assert [line.split()[:2] for line in said[:2]] == [["count", "skipped:"], ["count_more", "skipped:"]]
    assert Path("runs/try/join/joined.txt").read_text().startswith("A 0")


def test_an_equal_result_upstream_stops_the_change(recipe: Path) -> None:
    """The stage must run again, but what it wrote is the same, so what reads it still holds."""
    run(recipe)
    said = run(recipe, "count.fail_at=7")
    assert [line.split()[:2] for line in said if line.startswith("join")] == [["join", "skipped:"]]


def test_a_dry_run_says_what_and_why_and_does_nothing(recipe: Path) -> None:
    before = sorted(Path().rglob("*"))
    said = run(recipe, dry_run=True)
    assert [line.split(None, 2) for line in said] == [
        ["count", "run", "not run yet"],
        ["count_more", "run", "not run yet"],
        ["join", "run", "after count, count_more, which it reads"],
    ]
    assert sorted(Path().rglob("*")) == before
    run(recipe, until="count_more")
    with pytest.raises(MissingInput):
        run(recipe, "count_more.fail_at=1")
    said = run(recipe, "count_more.fail_at=1", dry_run=True)
    assert said[0].split(None, 2)[1:] == ["skip", "done; config and inputs are unchanged"]
    assert said[1].split(None, 2)[1:] == ["resume", "cut off earlier; goes on from what it left"]
    said = run(recipe, "count.steps=5", dry_run=True)
    assert said[0].split(None, 2)[1:] == ["run", "its config changed: steps"]


def test_until_stops_after_a_stage(recipe: Path) -> None:
    run(recipe, until="count")
    assert sorted(path.name for path in Path("runs/try").iterdir()) == ["configs", "count", "summary.json"]
    with pytest.raises(UnknownName, match=r"unknown stage of the recipe 'jion'; did you mean join\?"):
        run(recipe, until="jion")


def test_the_saved_config_of_an_entry_runs_alone(recipe: Path) -> None:
    run(recipe)
    entry = load(recipe).entry("count_more")
    assert parse(fakes.CountConfig, load_yaml("runs/try/configs/count_more.yaml")) == entry.config


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        (("join.shuot=1",), ConfigError, "command line: join.shuot is not a known key; did you mean shout?"),
        (("jion.shout=1",), UnknownName, "jion: unknown stage 'jion'; did you mean join? known: count, join"),
        (("join.parts.0=${cuont}",), ConfigError, "join.parts.0: ${cuont} is not an entry of the recipe"),
        (("count.source=${join}",), ConfigError, "count.source: ${join} comes later in the recipe"),
        (("count_more.stage=conut",), UnknownName, "count_more.stage: unknown stage 'conut'"),
        (("join.parts=[nowhere/at/all]",), MissingInput, "join.parts.0: nowhere/at/all: no such file or folder"),
        (("join=3",), ConfigError, "join must hold the stage's keys, not 3"),
        (("name=../up",), ConfigError, "name must be a word"),
        (("seed=x",), ConfigError, "seed must be a whole number"),
        (("seed=-1",), ConfigError, "count.seed: input should be greater than or equal to 0"),
    ],
)
def test_a_mistake_in_any_stage_is_refused_before_the_first_starts(
    recipe: Path, change: tuple[str, ...], error: type[MmfoundryError], expected: str
) -> None:
    with pytest.raises(error) as caught:
        run(recipe, *change)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("runs").exists()


def test_a_stage_that_fails_leaves_the_earlier_ones_done(recipe: Path) -> None:
    with pytest.raises(MissingInput, match="told to fail"):
        run(recipe, "count_more.fail_at=0")
    assert Artifact.open("runs/try/count").manifest.stage == "count"
    assert not Path("runs/try/count_more").exists()
    assert json.loads(Path("runs/try/summary.json").read_text())["count/steps"] == 3


def test_an_empty_recipe_says_what_could_be_in_it(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match="no stages in it; known stages: count, join"):
        load(tmp_path / "empty.yaml")


def test_a_run_folder_may_be_moved(recipe: Path, tmp_path: Path) -> None:
    run(recipe)
    moved = Path("runs/try").rename(tmp_path / "moved")
    actions = {now.action for _, now in plan(load_recipe(recipe, fakes.STAGES, output=moved))}
    assert actions == {"skip"}


def test_a_list_of_entries_keeps_yaml_order(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("x")
    tree = {name: {"stage": "count", "source": str(tmp_path / "s.txt")} for name in ("z", "a", "m")}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    assert [entry.name for entry in load(tmp_path / "r.yaml").entries] == ["z", "a", "m"]
