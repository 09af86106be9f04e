"""Ranks that are stopped, killed, stuck or broken end the run soon, with a line that names them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mmfoundry.pipeline import heartbeat
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.errors import MmfoundryError
from mmfoundry.pipeline.heartbeat import Doing, Heartbeat, HeartbeatConfig
from mmfoundry.pipeline.ranks import start_ranks
from tests.pipeline.tiny_training import trainer_config

ROOT = Path(__file__).parents[2]
LIMITS = {"silence_timeout_s": 6, "step_timeout_s": 900}


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def failure(tmp_path: Path, *trouble: str, world: int = 2, **limits: float) -> tuple[str, float]:
    """What a run ends with, and how long it took, starting included."""
    config = {"trainer": trainer_config(heartbeat=LIMITS | limits)}
    started = time.monotonic()
    with pytest.raises(MmfoundryError) as error:
        start_ranks("tests.pipeline.one_rank", [str(tmp_path / "out"), json.dumps(config), *trouble], world)
    return str(error.value), time.monotonic() - started


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stopped_rank_is_named(lost: int, tmp_path: Path) -> None:
    text, seconds = failure(tmp_path, "SIGSTOP", "5", str(lost))
    assert f"rank {lost} on " in text
    assert "does not answer: last heard of" in text
    # a rank signs in every second, and steps may be shorter than that here
    assert re.search(r"s ago at step [0-5], [a-z ]+; rank", text)
    assert f"rank {1 - lost} waits for it at step 6, " in text
    assert text.endswith("run again to go on from the last checkpoint")
    assert seconds < 240  # a collective would wait for 30 minutes
    stack = (tmp_path / "out.work" / f"hung-{1 - lost}.txt").read_text()
    assert "updates.py" in stack  # somewhere in a step


@pytest.mark.slow
def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    text, _ = failure(tmp_path, "SIGKILL", "5", "1", silence_timeout_s=100.0)
    assert "rank 1" in text
    assert "run again to go on from the last checkpoint" in text


def test_a_rank_without_data_is_named(tmp_path: Path) -> None:
    text, _ = failure(tmp_path, "hang", "4", "1", step_timeout_s=4.0)
    assert "rank 1 on " in text
    assert "hangs: for" in text
    assert "it has been waiting for data at step 4; rank 0 waits for it at step 4" in text
    assert "_fetch" in (tmp_path / "out.work" / "hung-1.txt").read_text()


@pytest.mark.slow
def test_a_rank_s_own_error_is_what_is_told(tmp_path: Path) -> None:
    text, _ = failure(tmp_path, "raise", "4", "1")
    assert "rank 1" in text


def test_killed_beside_another_machine_s_rank(tmp_path: Path) -> None:
    """Started by hand, as launchers on two machines do: nobody ends the survivor but itself."""
    config = {"trainer": trainer_config(heartbeat=LIMITS)}
    code = (
        "import os, sys, runpy\n"
        "from mmfoundry.pipeline import heartbeat\n"
        "heartbeat._place = lambda: os.environ['RANK']\n"  # as if each had a machine of its own
        f"sys.argv[1:] = {[str(tmp_path / 'out'), json.dumps(config), 'SIGKILL', '5', '0']!r}\n"
        "runpy.run_module('tests.pipeline.one_rank', run_name='__main__')\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        _, said = ranks[1].communicate(timeout=240)
        assert ranks[0].wait() == -signal.SIGKILL
        assert ranks[1].returncode == 2
        assert "error: rank 0 on " in said
        assert "; rank 1 waits for it at step 6" in said
    finally:
        for rank in ranks:
            rank.kill()


def test_alone_nothing_is_done(tmp_path: Path) -> None:
    with Heartbeat(HeartbeatConfig(), Runtime(), tmp_path) as heart:
        heart.at(1, Doing.DATA)
        assert heart._threads == []
    with pytest.raises(ValueError, match="connection"), Heartbeat(HeartbeatConfig(), Runtime(), tmp_path):
        raise ValueError("gloo connection")


def test_who_is_furthest_behind_is_blamed(tmp_path: Path) -> None:
    config = parse(HeartbeatConfig, {"silence_timeout_s": 30, "step_timeout_s": 50})
    heart = Heartbeat(config, Runtime(world_size=4), tmp_path)
    heart.at(7, Doing.JOINING)
    now = time.monotonic()

    def sign(rank: int, **known: Any) -> None:
        found = heartbeat._Sign(rank, f"node{rank}", f"place{rank}", 100 + rank, **known)
        heart._heard[rank] = (found, now)

    sign(1, step=7, doing=int(Doing.JOINING), busy_s=60.0)
    sign(2, step=7, doing=int(Doing.LOSSES), busy_s=58.0)
    sign(3, step=0, ended="")
    assert "rank 2 on node2 (process 102) hangs: for 58 s" in str(heart._judge(now))
    sign(1, step=7, doing=int(Doing.JOINING), busy_s=40.0)
    sign(2, step=7, doing=int(Doing.LOSSES), busy_s=40.0)
    assert heart._judge(now) is None
    assert "rank 1 on node1 (process 101) does not answer" in str(heart._judge(now + 31))
    sign(1, step=7, ended="ValueError: no")
    assert heart._judge(now + 1) is None
    assert "rank 1 on node1 ended at step 7: ValueError: no" in str(heart._judge(now + 6))
