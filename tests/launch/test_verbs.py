"""A stage's verb: its own config or a recipe's entry, where its artifact goes, and what it reads."""

import json
from pathlib import Path

import pytest
import yaml

from mmfoundry.launch import verbs
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.errors import ConfigError, MissingInput
from mmfoundry.pipeline.recipe import load_recipe, run_recipe
from tests.pipeline import fake_stages as fakes
from tests.pipeline.tiny_training import TINY, TinyConfig, trainer_config


@pytest.fixture(autouse=True)
def _here(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    Path("count.yaml").write_text("source: pool\nsteps: 2\n")


def prepare(stage: str, config: str, *arguments: str) -> verbs.Job:
    return verbs.prepare(fakes.STAGES, stage, Path(config), arguments)


def test_a_config_of_its_own() -> None:
    job = prepare("count", "count.yaml", "steps=4", "output=made/here")
    assert (job.config.steps, job.output) == (4, Path("made/here"))  # type: ignore[attr-defined]
    assert prepare("count", "count.yaml").output == Path("runs/count/count")
    assert prepare("count", "count.yaml", "output=~/made").output == Path.home() / "made"
    made = verbs.execute(job, Runtime())
    assert verbs.outcome(made).endswith("steps 4, written_now 4")
    first, rest = verbs.describe(job).split("\n", 1)
    assert first.endswith("skip, done; config and inputs are unchanged")
    assert yaml.safe_load(rest) == job.config.model_dump(mode="json")  # defaults and overrides in it


def test_a_training_shows_what_deepspeed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_config(zero_optimization={"stage": 2}, train_micro_batch_size_per_gpu=3, deepspeed="ds.json")
    Path("ds.json").write_text('{"zero_optimization": {"reduce_bucket_size": 99}}')
    job = verbs.Job(TINY, TinyConfig.model_validate({"trainer": trainer}), Path("made"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    told, settings_of = verbs.describe(job).split("trainer: DeepSpeed's settings on 2 rank(s)")
    assert told.startswith("tiny -> made: run, not run yet\n")
    settings = json.loads(settings_of.split("\n", 1)[1])
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["zero_optimization"]["reduce_bucket_size"] == 99
    Path("ds.json").write_text('{"train_batch_size": 99}')
    with pytest.raises(ConfigError, match="train_batch_size is 99, but train_batch_size makes it 12"):
        verbs.describe(job)
    assert not Path("made").exists()


def test_an_entry_of_a_recipe() -> None:
    job = prepare("count", "recipe.yaml", "steps=1")
    assert (job.config.steps, job.output) == (1, Path("runs/try/count"))  # type: ignore[attr-defined]
    assert prepare("count", "recipe.yaml", "count.steps=1").config == job.config


def test_an_entry_reads_what_the_recipe_s_run_left() -> None:
    with pytest.raises(MissingInput, match=r"join reads \$\{count\}, and .* mmfoundry run recipe\.yaml --until count"):
        prepare("join", "recipe.yaml")
    run_recipe(load_recipe("recipe.yaml", fakes.STAGES), until="count", say=lambda line: None)
    assert prepare("join", "recipe.yaml").config.parts == ["runs/try/count"]  # type: ignore[attr-defined]


def test_several_entries_of_one_stage_must_be_told_apart() -> None:
    Path("two.yaml").write_text("a: {stage: count, source: pool}\nb: {stage: count, source: pool, steps: 5}\n")
    with pytest.raises(ConfigError, match="choose one of its count entries with entry=NAME: a, b"):
        prepare("count", "two.yaml")
    with pytest.raises(ConfigError, match="choose one of its count entries"):
        prepare("count", "two.yaml", "entry=c")
    assert prepare("count", "two.yaml", "entry=b").config.steps == 5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("stepz=3",), r"command line: stepz is not a known key; did you mean steps\?"),
        (("entry=a",), "entry=a: not a recipe with a count entry"),
        (("source=${filter}",), "means an entry of a recipe, but this config is one stage's"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        prepare("count", "count.yaml", *arguments)
