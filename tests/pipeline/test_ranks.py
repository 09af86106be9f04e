"""Ranks as processes: they find one another, their errors come back as one, and they do not outlive their starter."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmfoundry.pipeline.errors import PREEMPTED_EXIT_CODE, MmfoundryError
from mmfoundry.pipeline.ranks import start_ranks

RANK = """
import os, sys, time, socket
from mmfoundry.pipeline.ranks import end_with_starter
end_with_starter()
what, folder = sys.argv[1:]
rank = int(os.environ["RANK"])
open(f"{folder}/pid-{rank}", "w").write(str(os.getpid()))
if what == "sum":
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    open(f"{folder}/sum-{rank}", "w").write(str(total.item()))
    dist.destroy_process_group()
if what == "refuse" and rank == 1:
    open(os.environ["MMFOUNDRY_ERROR_FILE"], "w").write("pool: no such file")
    sys.exit(2)
if what == "crash" and rank == 1:
    raise RuntimeError("a bug in rank 1")
if what == "save":
    import signal
    def save(number, frame):
        time.sleep(0.5 * rank)  # the ranks do not end in the same moment
        open(f"{folder}/saved-{rank}", "w").close()
        sys.exit(85)
    signal.signal(signal.SIGUSR1, save)
    open(f"{folder}/ready-{rank}", "w").close()
if what in ("refuse", "crash", "wait", "save"):
    time.sleep(900)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "one_rank.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "one_rank"


def alive(folder: Path) -> list[int]:
    found = []
    for file in folder.glob("pid-*"):
        status = Path(f"/proc/{file.read_text()}/status")
        if status.exists() and "State:\tZ" not in status.read_text():
            found.append(int(file.read_text()))
    return found


def test_ranks_join_one_another(module: str, tmp_path: Path) -> None:
    start_ranks(module, ["sum", str(tmp_path)], 2)
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in (0, 1)] == ["3", "3"]


def test_a_rank_s_own_error_comes_back_and_the_others_end(module: str, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(MmfoundryError, match=r"^pool: no such file$"):
        start_ranks(module, ["refuse", str(tmp_path)], 2)
    assert time.monotonic() - started < 300
    assert alive(tmp_path) == []


def test_a_crash_shows_the_rank_s_traceback(module: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MmfoundryError, match="one_rank: rank 1 ended with exit code 1"):
        start_ranks(module, ["crash", str(tmp_path)], 2)
    assert "RuntimeError: a bug in rank 1" in capfd.readouterr().err


def test_ranks_end_when_their_starter_is_killed(module: str, tmp_path: Path) -> None:
    code = f"from mmfoundry.pipeline.ranks import start_ranks; start_ranks({module!r}, ['wait', {str(tmp_path)!r}], 2)"
    starter = subprocess.Popen([sys.executable, "-c", code], env=os.environ)
    deadline = time.monotonic() + 300
    while len(list(tmp_path.glob("pid-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(alive(tmp_path)) == 2
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    while alive(tmp_path):
        assert time.monotonic() < deadline, "ranks went on alone"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("what", "ready", "left"),
    [("save", "ready", ["saved-0", "saved-1"]), ("wait", "pid", [])],
    ids=["ranks that save", "ranks that do not listen yet"],
)
def test_being_told_to_stop_reaches_every_rank_and_its_code_comes_back(
    module: str, tmp_path: Path, what: str, ready: str, left: list[str]
) -> None:
    def tell_when_ready() -> None:
        while not all((tmp_path / f"{ready}-{rank}").exists() for rank in (0, 1)):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    handler = signal.getsignal(signal.SIGUSR1)
    threading.Thread(target=tell_when_ready, daemon=True).start()
    with pytest.raises(SystemExit) as stop:
        start_ranks(module, [what, str(tmp_path)], 2)
    assert stop.value.code == PREEMPTED_EXIT_CODE
    assert sorted(file.name for file in tmp_path.glob("saved-*")) == left
    assert signal.getsignal(signal.SIGUSR1) == handler
