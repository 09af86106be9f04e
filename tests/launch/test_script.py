"""The launcher scripts: the same stage under python, torchrun, deepspeed and `--processes`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmfoundry.launch.catalog import OUR_STAGES
from mmfoundry.launch.script import take_local_rank
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.errors import MmfoundryError
from mmfoundry.pipeline.recipe import load_recipe, run_recipe
from tests.pipeline import fake_stages as fakes

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
DEEPSPEED = [shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or "deepspeed", "--num_gpus", "2"]


@pytest.fixture
def script(outside: Path, here: Path) -> Path:
    """A script as those in launch/, for the outside stage `count`."""
    file = here / "one_rank.py"
    file.write_text((LAUNCH / "pretrain.py").read_text().replace('main("pretrain")', 'main("count")'))
    assert "count" in file.read_text()
    return file


def launch(starter: list[str], outside: Path, here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*starter, "one_rank.py", *arguments],
        cwd=here,
        env={key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        | {"PYTHONPATH": str(outside)},
        capture_output=True,
        text=True,
        timeout=3000,
    )


@pytest.mark.parametrize("starter", [[sys.executable], TORCHRUN, DEEPSPEED], ids=["python", "torchrun", "deepspeed"])
@pytest.mark.usefixtures("script")
def test_every_launcher_makes_the_same_artifact(starter: list[str], outside: Path, here: Path) -> None:
    done = launch(starter, outside, here, "recipe.yaml", "steps=2", "output=made")
    assert done.returncode == 0, done.stderr
    made = Artifact.open(here / "made").manifest
    assert made.environment["ranks"] == ("1" if len(starter) == 1 else "2")
    assert (here / "made" / "step-1.txt").read_text() == "a 1\n"
    assert done.stdout.count("made: done in") == 1


@pytest.mark.usefixtures("script")
def test_a_mistake_is_told_once_by_rank_0(outside: Path, here: Path) -> None:
    done = launch(TORCHRUN, outside, here, "recipe.yaml", "stepz=2")
    assert done.returncode != 0
    assert done.stderr.count("error: command line: count.stepz is not a known key; did you mean steps?") == 1


@pytest.mark.parametrize("starter", [[sys.executable], DEEPSPEED], ids=["python", "deepspeed"])
@pytest.mark.usefixtures("script")
def test_a_dry_run_says_once_what_would_be_done_and_does_nothing(starter: list[str], outside: Path, here: Path) -> None:
    done = launch(starter, outside, here, "recipe.yaml", "steps=2", "output=made", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("count -> made: run, not run yet\n") == 1
    assert "\nsteps: 2\n" in done.stdout
    assert not (here / "made").exists()
    assert not list(here.glob("made.*"))


@pytest.mark.usefixtures("script")
def test_usage_is_shown(outside: Path, here: Path) -> None:
    assert launch([sys.executable], outside, here).returncode == 2
    shown = launch([sys.executable], outside, here, "--help")
    assert shown.returncode == 0
    assert "CONFIG [key=value ...]" in shown.stderr


def test_local_rank_is_taken_out() -> None:
    assert take_local_rank(["--local_rank=1", "c.yaml", "a=b"]) == (["c.yaml", "a=b"], "1")
    assert take_local_rank(["c.yaml", "--local-rank", "0", "a=b"]) == (["c.yaml", "a=b"], "0")
    assert take_local_rank(["c.yaml"]) == (["c.yaml"], None)


def test_a_recipe_starts_its_ranks_itself(
    script: Path, outside: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", f"{outside}{os.pathsep}{here}")
    modules = {"count": "one_rank"}
    run_recipe(load_recipe("recipe.yaml", fakes.STAGES), processes=2, rank_modules=modules)
    assert Artifact.open("runs/try/count").manifest.environment["ranks"] == "2"
    assert Artifact.open("runs/try/join").manifest.environment["ranks"] == "1"
    assert "one_rank" not in capfd.readouterr().err
    with pytest.raises(MmfoundryError, match=r"^step 1 is told to fail$"):
        run_recipe(load_recipe("recipe.yaml", fakes.STAGES, ["count.fail_at=1"]), processes=2, rank_modules=modules)


def test_every_stage_has_a_script(tmp_path: Path) -> None:
    assert {path.stem for path in LAUNCH.glob("*.py")} >= set(OUR_STAGES)
    for stage in OUR_STAGES:
        assert f'    main("{stage}")\n' in (LAUNCH / f"{stage}.py").read_text()


@pytest.mark.parametrize("stage", ["pretrain", "eval"])
def test_a_script_refuses_a_missing_config(stage: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, LAUNCH / f"{stage}.py", "nope.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 2
    assert done.stderr == "error: nope.yaml: no such file\n"
