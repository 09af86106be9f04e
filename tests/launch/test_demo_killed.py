"""The demo's own recipe, killed in the middle of every training phase: nothing of what it learns may change."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmfoundry.pipeline.artifact import Artifact

ROOT = Path(__file__).resolve().parents[2]
# The real shards, models and batches; only fewer steps, so that both runs together take minutes.
STEPS = [
    "pretrain.trainer.max_steps=60",
    "pretrain.trainer.save_steps=20",
    "instruct.align.trainer.max_steps=40",
    "instruct.align.trainer.save_steps=15",
    "instruct.tune.trainer.max_steps=16",
    "instruct.tune.trainer.save_steps=5",
]
# stage, phase, step after which it is killed: each between two checkpoints
KILLS = [("pretrain", "train", 33), ("instruct", "align", 22), ("instruct", "tune", 8)]
STAGES = ("pretrain", "instruct")


def command(output: Path) -> list[str]:
    run = [sys.executable, "-m", "mmfoundry.launch.cli", "run", "configs/demo.yaml", *STEPS]
    return [*run, "--until", "instruct", "--output", str(output)]


def reached(log: Path, phase: str, step: int) -> bool:
    if not log.is_file():
        return False
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    return any(row["phase"] == phase and row["step"] >= step for row in rows)


def run_and_kill(output: Path, stage: str, phase: str, step: int) -> None:
    with subprocess.Popen(command(output), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True) as run:
        while not reached(output / f"{stage}.work" / "metrics.jsonl", phase, step):
            assert run.poll() is None, f"ended before step {step} of {phase}"
            time.sleep(0.2)
        os.killpg(run.pid, signal.SIGKILL)
    assert not (output / stage).exists()


def losses(output: Path, stage: str) -> dict[tuple[str, int], float]:
    rows = map(json.loads, (output / stage / "metrics.jsonl").read_text().splitlines())
    return {(row["phase"], row["step"]): row["loss"] for row in rows if "loss" in row}


def weights(output: Path, stage: str) -> str:
    return Artifact.open(output / stage).manifest.files["model.safetensors"].sha256


@pytest.mark.slow
def test_a_demo_killed_in_every_phase_learns_the_same(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    for stage, phase, step in KILLS:
        run_and_kill(killed, stage, phase, step)
    subprocess.run(command(killed), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    for stage in STAGES:
        assert losses(killed, stage) == losses(whole, stage)
        assert weights(killed, stage) == weights(whole, stage)
