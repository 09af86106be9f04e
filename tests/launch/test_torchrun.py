"""launch/torchrun.py: the ranks' exit code is the launcher's, and the order to stop reaches the ranks."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TORCHRUN = Path(__file__).resolve().parents[2] / "launch" / "torchrun.py"
RANK = """
import os, pathlib, signal, sys, time
def stop(number, frame):
    time.sleep(0.5)  # saves
    pathlib.Path(f"told-{os.environ['RANK']}").write_text(str(number))
    sys.exit(85)
if sys.argv[1:] != ["deaf"]:
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGUSR1, stop)
pathlib.Path(f"ready-{os.environ['RANK']}").touch()
if sys.argv[1:] not in ([], ["deaf"]):
    sys.exit(int(sys.argv[1]) if os.environ["RANK"] == "1" else 0)
time.sleep(300)
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    (folder / "rank.py").write_text(RANK)
    command = [sys.executable, str(TORCHRUN), "--standalone", "--nproc-per-node", "2", "rank.py", *arguments]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)


def tell(started: subprocess.Popen[str], number: signal.Signals, folder: Path) -> tuple[int, str]:
    """Send a signal to the launcher once its ranks are at work; its exit code, and what it said."""
    deadline = time.monotonic() + 120
    while len(list(folder.glob("ready-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started.send_signal(number)
    _, said = started.communicate(timeout=120)
    return started.returncode, said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_stop_it_ends_with_what_its_ranks_end_with(number: signal.Signals, tmp_path: Path) -> None:
    code, said = tell(start(tmp_path), number, tmp_path)
    assert code == 85, said
    assert (tmp_path / "told-0").read_text() == (tmp_path / "told-1").read_text() == str(int(number))


def test_told_before_its_ranks_listen_it_wants_to_be_started_again(tmp_path: Path) -> None:
    code, said = tell(start(tmp_path, "deaf"), signal.SIGUSR1, tmp_path)
    assert code == 85, said
    assert not list(tmp_path.glob("told-*"))


@pytest.mark.parametrize("code", [0, 3])
def test_it_ends_as_its_ranks_do(code: int, tmp_path: Path) -> None:
    started = start(tmp_path, str(code))
    _, said = started.communicate(timeout=120)
    assert started.returncode == code, said
    assert ("a rank ended with exit code 3" in said) == (code == 3)
