"""`index` and `data`: what is in shards, sample by sample, and what is damaged."""

import shutil
from pathlib import Path

import pytest

from mmfoundry.launch.catalog import OUR_STAGES, Stages
from mmfoundry.launch.cli import EXAMPLES
from mmfoundry.pipeline.recipe import load_recipe
from tests.launch.conftest import Command

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "data" / "samples"


@pytest.fixture
def shard(here: Path) -> Path:
    (here / "shards").mkdir()
    return Path(shutil.copy(SAMPLES / "pictures-noto-00000.tar", here / "shards" / "a.tar"))


def test_keys_are_listed_in_order(quick: Command, shard: Path) -> None:
    keys = quick("data", "keys", "shards").stdout.splitlines()
    assert len(keys) == len(set(keys)) > 100
    assert keys == quick("data", "keys", "shards/*.tar").stdout.splitlines()
    assert list(shard.parent.iterdir()) == [shard], "looking leaves nothing behind"


def test_a_sample_is_shown_by_number_and_by_key(quick: Command, shard: Path) -> None:
    keys = quick("data", "keys", "shards").stdout.splitlines()
    by_number = quick("data", "inspect", "shards", "--number", "3").stdout
    assert by_number == quick("data", "inspect", "shards", "--key", keys[3]).stdout
    assert by_number.splitlines()[0] == f"shards/a.tar: {keys[3]}"
    assert "image: 64 x 64 pixels" in by_number
    assert "caption: " in by_number
    assert '"concept": ' in by_number
    refused = quick("data", "inspect", "shards", "--number", "99999")
    assert refused.stderr.startswith("error: shards/a.tar: no sample 99999; there are ")
    assert "no sample with key 'nobody'" in quick("data", "inspect", "shards", "--key", "nobody").stderr


def test_verify_counts_what_cannot_be_used(quick: Command, shard: Path) -> None:
    whole = quick("data", "verify", "shards")
    assert whole.returncode == 0
    assert whole.stdout.endswith("0 problems\n")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    cut = quick("data", "verify", "shards")
    assert cut.returncode == 1
    assert "0 problems" not in cut.stdout
    assert cut.stderr == ""


def test_index_is_kept_beside_the_shard_and_tells_damage(quick: Command, shard: Path) -> None:
    done = quick("index", "shards")
    assert done.returncode == 0
    assert (shard.parent / "a.tar.mmf.idx").is_file()
    assert done.stdout.splitlines()[-1].endswith("samples, 0 damaged places")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    damaged = quick("index", "shards").stdout.splitlines()
    assert damaged[1].startswith("  byte ")
    assert not damaged[-1].endswith(" 0 damaged places")


def test_the_demo_recipe_and_the_examples_of_help_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    examples = [f"{stage}.{key}" for stage, keys in EXAMPLES.items() for key in keys.split()]
    recipe = load_recipe("configs/demo.yaml", Stages(), examples)
    assert {entry.stage.name for entry in recipe.entries} <= set(OUR_STAGES)
    assert recipe.output == Path("runs/demo")
