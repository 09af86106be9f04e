"""An outside package that adds two small stages through entry points, as a user's package would."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmfoundry.launch.cli import run_command
from mmfoundry.launch.failures import exit_code_of

FAKES = Path(__file__).resolve().parents[1] / "pipeline" / "fake_stages.py"
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with the package `outside_stages` 1.0 in it."""
    site = tmp_path / "site"
    info = site / "outside_stages-1.0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(FAKES, site / "outside_stages.py")
    with (site / "outside_stages.py").open("a") as file:
        file.write("\nCOUNT, JOIN = STAGES.values()\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-stages\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mmfoundry.stage]\ncount = outside_stages:COUNT\njoin = outside_stages:JOIN\n"
    )
    return site


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The folder that commands run in, with a recipe of the outside stages."""
    folder = tmp_path / "here"
    (folder / "pool").mkdir(parents=True)
    (folder / "pool" / "a.txt").write_text("a ")
    (folder / "recipe.yaml").write_text(
        "name: try\ncount:\n  source: pool\njoin:\n  parts: ['${count}']\n", encoding="utf-8"
    )
    return folder


@pytest.fixture
def command(outside: Path, here: Path) -> Command:
    """Runs `mmfoundry ARGUMENTS...` in `here`."""

    def run(*arguments: str, **named: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mmfoundry.launch.cli", *arguments],
            cwd=here,
            env=os.environ | {"PYTHONPATH": str(outside)},
            text=True,
            timeout=3000,
            **({"capture_output": True} | named),  # type: ignore[call-overload]
        )

    return run


@pytest.fixture
def quick(
    outside: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """As `command`, but in this process: for what ends before any stage runs."""
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(outside)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["mmfoundry", *arguments])
        try:  # not `main`, whose way out of a process that has joined others takes pytest with it
            code = exit_code_of(run_command)
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    yield run
    sys.modules.pop("outside_stages", None)
