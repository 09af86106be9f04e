"""The command as a user meets it: in a process of its own, judged by what it prints and its exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmfoundry.launch.catalog import OUR_STAGES, REGISTRIES, open_registry
from mmfoundry.launch.failures import system_error
from tests.launch.conftest import Command


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one error line of a refused command."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run", "nope.yaml"), "nope.yaml: no such file"),
        (("run", "recipe.yml"), "recipe.yml: no such file; did you mean recipe.yaml?"),
        (("run", "pool"), "pool: a folder, not a file"),
        (("run", "recipe.yaml", "join.shuot=1"), "command line: join.shuot is not a known key; did you mean shout?"),
        (("run", "recipe.yaml", "count.steps=many"), "command line: count.steps: input should be a valid integer"),
        (("run", "recipe.yaml", "count.source=gone"), "count.source: gone: no such file or folder"),
        (("run", "recipe.yaml", "count.steps"), "'count.steps' is not key=value"),
        (("run", "recipe.yaml", "--until", "joyn"), "did you mean join?"),
        (("run", "recipe.yaml", "--processes", "0"), "Invalid value for '--processes'"),
        (("run",), "Missing argument 'CONFIG'"),
        (("pretain", "x"), "No such command 'pretain'. Did you mean 'pretrain'?"),
        (("run", "--ouput", "x"), "No such option: --ouput"),
        (("pretrain", "nope.yaml"), "nope.yaml: no such file"),
        (("list", "objektive"), "unknown kind 'objektive'; did you mean objective?"),
        (("config", "schema", "cuont"), "unknown stage 'cuont'; did you mean count?"),
        (("report", "nowhere"), "nowhere: no such run folder"),
        (("index", "nowhere"), "nowhere: no such shard"),
        (("data", "keys", "pool"), "pool: no *.tar in this folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(quick: Command, arguments: tuple[str, ...], expected: str) -> None:
    assert expected in error_of(quick(*arguments))


def test_a_typo_in_the_file_names_file_and_key(quick: Command, here: Path) -> None:
    (here / "recipe.yaml").write_text("count:\n  source: pool\n  stepz: 3\n")
    assert error_of(quick("run", "recipe.yaml")) == "recipe.yaml: count.stepz is not a known key; did you mean steps?"
    (here / "recipe.yaml").write_text("count:\n  source: pool\n\tsteps: 3\n")
    assert error_of(quick("run", "recipe.yaml")).startswith("recipe.yaml, line 3: ")
    assert not (here / "runs").exists()


def test_a_folder_that_is_to_be_made_below_a_file_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="exists") as caught:
        (tmp_path / "file").mkdir(parents=True, exist_ok=True)  # as run_stage makes an output's parent
    assert system_error(caught.value) == f"{tmp_path / 'file'}: file exists"


def test_a_mistake_in_a_real_process(command: Command) -> None:
    assert error_of(command("run", "nope.yaml")) == "nope.yaml: no such file"


def test_a_recipe_runs_once(command: Command, here: Path) -> None:
    dry = command("run", "recipe.yaml", "--dry-run")
    assert dry.returncode == 0
    assert not (here / "runs").exists()
    first = command("run", "recipe.yaml", "count.steps=2")
    assert first.returncode == 0, first.stderr
    assert json.loads((here / "runs/try/summary.json").read_text())["join/files"] == 2
    made = (here / "runs/try/count/manifest.json").stat().st_mtime_ns
    second = command("run", "recipe.yaml", "count.steps=2")
    assert second.returncode == 0
    assert second.stdout.startswith("runs/try: nothing to do, 2 stages are done")
    assert (here / "runs/try/count/manifest.json").stat().st_mtime_ns == made
    elsewhere = command("run", "recipe.yaml", "--output", "other", "--until", "count")
    assert elsewhere.returncode == 0
    assert (here / "other/count/manifest.json").is_file()
    assert not (here / "other/join").exists()


def test_a_full_disk_is_one_line(command: Command) -> None:
    done = command("run", "recipe.yaml", "count.fail_at=1", "count.full_disk=true")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: count: no space left on the disk of ")
    assert "Traceback" not in done.stderr
    with open("/dev/full", "w") as full:
        done = command("list", "stage", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no space left on the disk")


def test_a_bug_keeps_its_traceback(command: Command, outside: Path) -> None:
    source = (outside / "outside_stages.py").read_text()
    (outside / "outside_stages.py").write_text(source.replace("done = 0", "done = 1 // 0"))
    done = command("run", "recipe.yaml")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 85, "told to stop"), (signal.SIGUSR1, 85, "told to stop")],
    ids=["Ctrl-C", "SIGTERM", "SIGUSR1"],
)
def test_an_interrupt_is_told_and_work_is_kept(
    command: Command, here: Path, outside: Path, number: signal.Signals, code: int, said: str
) -> None:
    arguments = [
        sys.executable,
        "-m",
        "mmfoundry.launch.cli",
        "run",
        "recipe.yaml",
        "count.steps=9",
        "count.pause_s=0.5",
    ]
    process = subprocess.Popen(
        arguments, cwd=here, env=os.environ | {"PYTHONPATH": str(outside)}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 3000
    while not (here / "runs/try/count.work/step-0.txt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=300)
    assert process.returncode == code
    assert error.splitlines()[-1] == f"error: {said}; run the same command again to go on"
    assert "resume" in command("run", "recipe.yaml", "count.steps=9", "count.pause_s=0.5", "--dry-run").stdout


def test_a_closed_pipe_is_no_error(here: Path, outside: Path) -> None:
    """As `mmfoundry ... | head -0` leaves it: the reader is gone before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "mmfoundry.launch.cli", "config", "schema", "count"],
        cwd=here,
        env=os.environ | {"PYTHONPATH": str(outside)},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert done.returncode == 0
    assert done.stderr == ""


def test_help_teaches_with_an_example(quick: Command) -> None:
    text = quick("--help").stdout
    assert all(verb in text for verb in ("run", "doctor", "list", "report", "config", "data", "index", *OUR_STAGES))
    for verb in ("run", "doctor", "list", "report", "index", *OUR_STAGES):
        assert "Example: mmfoundry" in quick(verb, "--help").stdout, verb


def test_schema_describes_every_key(quick: Command) -> None:
    schema = json.loads(quick("config", "schema", "count").stdout)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["steps"] == {
        "default": 3, "description": "files to write", "minimum": 1, "title": "Steps", "type": "integer",
    }  # fmt: skip


def test_list_shows_outside_stages_and_every_kind(quick: Command) -> None:
    stages = quick("list", "stages").stdout
    assert "counts to a number" in stages
    assert "outside_stages" in stages
    kinds = quick("list").stdout.split()
    assert kinds == ["stage", *REGISTRIES]


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_kind_can_be_listed(kind: str) -> None:
    rows = open_registry(kind).describe()
    assert rows
    assert all(row.summary and row.source for row in rows), rows


def test_doctor_speaks_of_this_machine(quick: Command) -> None:
    done = quick("doctor")
    assert done.returncode == 0
    assert "torch" in done.stdout
    assert sys.executable in done.stdout
