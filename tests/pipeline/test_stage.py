"""Stages: whole or absent, skipped when they hold, resumed after a kill, refused where they would overwrite."""

import fcntl
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import Field

from mmfoundry.pipeline import stage as stage_module
from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput, MmfoundryError, NotEnoughSpace
from mmfoundry.pipeline.stage import RunContext, record_inputs, resolve_inputs, run_stage, standing, work_folder
from tests.pipeline import fake_stages as fakes

HERE = Path(__file__).resolve().parent
COUNT = fakes.STAGES["count"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.txt").write_text("hello ")
    return folder


def count(source: Path, output: Path, **keys: object) -> Artifact:
    return run_stage(COUNT, parse(fakes.CountConfig, {"source": str(source)} | keys), output, Runtime())


def where_it_stands(source: Path, output: Path, **keys: object) -> tuple[str, str]:
    config = parse(fakes.CountConfig, {"source": str(source)} | keys)
    found = standing(COUNT, config, output, record_inputs(config, resolve_inputs(COUNT, config)))
    return found.action, found.why


def test_an_artifact_tells_what_made_it(source: Path, tmp_path: Path) -> None:
    made = count(source, tmp_path / "out", seed=7)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["stage"] == "count"
    assert manifest["config"]["steps"] == 3
    assert manifest["seed"] == 7
    assert manifest["inputs"]["source"]["ref"] == str(source)
    assert manifest["metrics"] == {"steps": 3.0, "written_now": 3.0}
    assert manifest["files"]["step-0.txt"]["bytes"] == len("hello 0\n")
    assert {"python", "torch", "ranks", "device"} <= manifest["environment"].keys()
    assert manifest["seconds"] > 0
    assert made.manifest.code_version.startswith("0.")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    made.verify()


def test_two_runs_of_one_config_have_one_digest(source: Path, tmp_path: Path) -> None:
    """Logs and times differ between them; a later stage must not run again for that."""
    one, two = count(source, tmp_path / "one"), count(source, tmp_path / "two")
    assert one.manifest.digest == two.manifest.digest
    assert count(source, tmp_path / "three", steps=2).manifest.digest != one.manifest.digest


def test_a_second_run_does_nothing(source: Path, tmp_path: Path) -> None:
    count(source, tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert where_it_stands(source, tmp_path / "out") == ("skip", "done; config and inputs are unchanged")
    again = count(source, tmp_path / "out")
    assert again.manifest.metrics["written_now"] == 3
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before


def test_what_changed_is_named_and_the_old_artifact_is_kept_aside(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    count(source, out)
    assert where_it_stands(source, out, steps=4) == ("run", "its config changed: steps")
    (source / "b.txt").write_text("more ")
    assert where_it_stands(source, out) == ("run", "its input changed: source")
    count(source, out, steps=4)
    assert (out / "step-3.txt").is_file()
    assert Artifact.open(tmp_path / "out.stale").manifest.config["steps"] == 3


class CountConfigOfALaterRelease(fakes.CountConfig):
    """With one more key."""

    shout: bool = Field(False, description="write in capitals")


CountConfigOfALaterRelease.__qualname__ = fakes.CountConfig.__qualname__


def test_a_key_that_came_since_does_not_make_an_artifact_stale(source: Path, tmp_path: Path) -> None:
    def later(**keys: object) -> tuple[str, str]:
        config = parse(CountConfigOfALaterRelease, {"source": str(source)} | keys)
        stage = replace(COUNT, config_type=CountConfigOfALaterRelease)
        found = standing(stage, config, tmp_path / "out", record_inputs(config, resolve_inputs(stage, config)))
        return found.action, found.why

    count(source, tmp_path / "out")
    assert later() == ("skip", "done; config and inputs are unchanged")
    assert later(shout=True) == ("run", "its config changed: shout")
    assert later(steps=4) == ("run", "its config changed: steps")
    (source / "b.txt").write_text("more ")
    assert later() == ("run", "its input changed: source")
    manifest = tmp_path / "out" / "manifest.json"
    told = json.loads(manifest.read_text())
    told["config"] |= {"whisper": True}  # a key that is gone
    told["config_digest"] = "0" * 64
    manifest.write_text(json.dumps(told))
    assert later()[1] == "its config changed: shout, whisper"


def test_moved_inputs_and_outputs_still_hold(source: Path, tmp_path: Path) -> None:
    count(source, tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    source = source.rename(tmp_path / "elsewhere" / "pool")
    out = (tmp_path / "out").rename(tmp_path / "elsewhere" / "made")
    assert where_it_stands(source, out)[0] == "skip"


def test_files_deleted_or_cut_by_hand_are_noticed(source: Path, tmp_path: Path) -> None:
    made = count(source, tmp_path / "out")
    (made.path / "step-1.txt").write_text("hallo 1\n")
    assert made.damage() is None  # the size fits; `verify` reads
    with pytest.raises(DamagedInput, match=r"step-1\.txt: altered"):
        made.verify()
    (made.path / "step-1.txt").write_text("")
    assert where_it_stands(source, made.path) == ("run", "step-1.txt has 0 bytes, not 8")
    (made.path / "step-1.txt").unlink()
    assert where_it_stands(source, made.path) == ("run", "step-1.txt is gone")
    count(source, made.path)
    assert (made.path / "step-1.txt").is_file()


def test_a_failed_stage_leaves_no_artifact_and_goes_on(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(MissingInput, match="told to fail"):
        count(source, out, fail_at=2)
    assert not out.exists()
    assert where_it_stands(source, out, fail_at=2)[0] == "resume"
    assert where_it_stands(source, out)[0] == "run", "another config must not take over the work"
    (work_folder(out) / "step-2.txt").write_text("mended\n")
    made = count(source, out, fail_at=2)
    assert made.manifest.metrics["written_now"] == 0
    assert not work_folder(out).exists()
    assert not (out / "stage.json").exists()


def test_an_output_and_an_input_are_apart(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"source/out: lies in count\.source, .*/source, which it would change"):
        count(source, source / "out")
    assert sorted(path.name for path in source.iterdir()) == ["a.txt"]
    made = count(source, tmp_path / "made")
    for inside in (made.path, made.path / "step-0.txt"):
        with pytest.raises(ConfigError, match=r"count\.source: .* lies in the output, .*/made;"):
            count(inside, made.path)
    assert made.damage() is None
    count(made.path, made.path / "again")  # an artifact is known by its manifest, whatever else lies in its folder
    assert where_it_stands(made.path, made.path / "again")[0] == "skip"


def test_stale_work_is_moved_aside(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with pytest.raises(MissingInput):
        count(source, out, fail_at=2)
    assert "out.stale" not in capsys.readouterr().err
    count(source, out, steps=1)
    assert (tmp_path / "out.stale" / "step-1.txt").is_file()
    assert not (out / "step-1.txt").exists()
    assert "count: its cut-off run was for another config or input; out.work is now out.stale\n" in (
        capsys.readouterr().err
    )
    count(source, out, steps=2)
    expected = "count: its config changed: steps; out is now out.stale, in place of an older one\n"
    assert expected in capsys.readouterr().err
    assert expected in (out / "messages.txt").read_text()
    count(source, out, steps=2)
    assert "out.stale" not in capsys.readouterr().err


def start(source: Path, folder: Path, steps: int) -> subprocess.Popen[str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"name: killed\ncount:\n  source: {source}\n  steps: {steps}\n  pause_s: 0.15\n")
    arguments = [sys.executable, str(HERE / "fake_stages.py"), str(recipe), str(folder / "run")]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def test_a_killed_stage_goes_on_where_it_was(source: Path, tmp_path: Path) -> None:
    """A real process, a real SIGKILL: nothing looks finished, and what was written is not written again."""
    first = start(source, tmp_path, steps=12)
    work = tmp_path / "run" / "count.work"
    deadline = time.monotonic() + 3000
    while not (work / "step-3.txt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert first.stdout
    first.stdout.close()
    assert not (tmp_path / "run" / "count").exists()
    left = {file.name: file.read_text() for file in work.glob("step-*.txt")}
    assert 4 <= len(left) < 12
    second = start(source, tmp_path, steps=12)
    said, _ = second.communicate(timeout=300)
    assert second.returncode == 0
    assert "goes on" in said
    made = Artifact.open(tmp_path / "run" / "count")
    assert made.manifest.metrics["written_now"] == 12 - len(left)
    assert all((made.path / name).read_text() == text for name, text in left.items())
    assert made.manifest.seconds > 12 * 0.15 * 0.9, "the killed part counts as well"
    third = start(source, tmp_path, steps=12)
    said, _ = third.communicate(timeout=300)
    assert "nothing to do" in said


def test_a_folder_of_something_else_is_never_touched(source: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match="exists and is not an artifact"):
        count(source, precious)
    assert (precious / "thesis.txt").read_text() == "years"
    (tmp_path / "empty").mkdir()
    assert count(source, tmp_path / "empty").path.is_dir()


def test_a_missing_input_is_told_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"^count\.source: .*nowhere: no such file or folder"):
        count(source / "nowhere", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_full_disk_is_one_line_and_keeps_the_work(source: Path, tmp_path: Path) -> None:
    with pytest.raises(NotEnoughSpace, match="what was finished is kept") as caught:
        count(source, tmp_path / "out", fail_at=1, full_disk=True)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "out.work" / "step-0.txt").is_file()


def test_two_runs_in_one_place_do_not_mix(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_module, "LOCK_WAIT_S", 0.3)
    with (tmp_path / ".out.lock").open("a+") as held:
        held.write("4711")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(MmfoundryError, match=r"another run \(process 4711\) is writing it"):
            count(source, tmp_path / "out")


def test_metrics_must_be_numbers(source: Path, tmp_path: Path) -> None:
    def run(config: object, context: RunContext) -> Artifact:
        return context.finish({"loss": float("nan"), "steps": 1.0})

    config = parse(fakes.CountConfig, {"source": str(source)})
    with pytest.raises(ValueError, match="metrics are not finite numbers: loss"):
        run_stage(replace(COUNT, run=run), config, tmp_path / "out", Runtime())
    assert not (tmp_path / "out").exists()


def test_checkpoints_do_not_go_into_the_artifact(source: Path, tmp_path: Path) -> None:
    def run(keep: bool) -> object:
        def stage(config: object, context: RunContext) -> Artifact:
            folder = context.work / "checkpoints" / "step-1"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "model.safetensors").write_text("weights")
            return context.finish({}, keep_checkpoints=keep)

        return stage

    config = parse(fakes.CountConfig, {"source": str(source)})
    gone = run_stage(replace(COUNT, run=run(False)), config, tmp_path / "gone", Runtime())
    kept = run_stage(replace(COUNT, run=run(True)), config, tmp_path / "kept", Runtime())
    assert gone.manifest.files == kept.manifest.files == {}
    assert not (gone.path / "checkpoints").exists()
    assert (kept.path / "checkpoints" / "step-1" / "model.safetensors").is_file()


def test_a_stage_does_not_depend_on_what_ran_before_it(source: Path, tmp_path: Path) -> None:
    import random

    import numpy as np
    import torch

    drawn = []

    def run(config: object, context: RunContext) -> Artifact:
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return context.finish({})

    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(5)
        random.random()
        config = parse(fakes.CountConfig, {"source": str(source), "seed": seed})
        run_stage(replace(COUNT, run=run), config, tmp_path / name, Runtime())
    assert drawn[0] == drawn[1] != drawn[2]
