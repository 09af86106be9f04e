"""What the cluster tests run: a tiny CLIP on the shipped pool, by the commands that docs/cluster.md shows."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "cluster.md"
CLUSTER = ROOT / "launch" / "cluster"
STEPS = 400
SILENCE_S = 6.0
# Every rank runs by these, wherever it is started. The commands of an environment are looked for in it first.
VARIABLES = {
    "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def write_config(folder: Path) -> Path:
    """A config whose run takes seconds, saves often, and notices a lost rank soon."""
    config = {
        "seed": 5,
        "data": [{"path": "data/samples/pool-*.tar"}],
        "model": {
            "embed_dim": 32,
            "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
            "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 2},
        },
        "loader": {"max_unreadable": 0.1, "index_dir": str(folder / "indexes")},
        "trainer": {
            "train_batch_size": 32,
            "max_steps": STEPS,
            "save_steps": 20,
            "logging_steps": 1,
            "optimizer": {"lr": 1e-3},
            "zero_optimization": {"stage": 1},
            "heartbeat": {"silence_timeout_s": SILENCE_S},
        },
    }
    path = folder / "pretrain.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def documented(name: str, **words: object) -> list[list[str]]:
    """The commands of the block marked `cluster: NAME` in docs/cluster.md, as argument lists.

    Args:
        name: of the block.
        words: each whole word or value of that name is replaced by what is given, wherever it stands.
    """
    found = re.search(
        rf"^<!-- cluster: {re.escape(name)} -->\n```bash\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert found, f"{PAGE.name} has no block for {name}"
    lines = found[1].replace("\\\n", " ").splitlines()
    return [_replaced(command, words) for command in (shlex.split(line, comments=True) for line in lines) if command]


def _replaced(command: list[str], words: dict[str, object]) -> list[str]:
    for word, value in words.items():
        assert any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", part) for part in command), f"no {word} in {command}"
        command = [re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", lambda _, v=value: str(v), part) for part in command]
    return command


def local_run(config: Path, output: Path) -> Path:
    """Two plain ranks on this machine, to compare with."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "launch/pretrain.py", str(config), f"output={output}"],
        cwd=ROOT,
        env=os.environ | VARIABLES,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def losses(artifact: Path) -> list[float]:
    """The loss of every step, as written."""
    return [line["loss"] for line in read_metrics(artifact / "metrics.jsonl")]


def check_same(output: Path, expected: Path) -> None:
    """Two ranks made this artifact, and the loss of every step is what it is there, to the last bit."""
    assert Artifact.open(output).manifest.environment["ranks"] == "2"
    assert losses(output) == losses(expected)
    assert len(losses(output)) == STEPS
    assert (output / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def steps_done(output: Path) -> int:
    """How many steps a run at work has logged."""
    log = output.with_name(f"{output.name}.work") / "metrics.jsonl"
    return len(log.read_text(encoding="utf-8").splitlines()) if log.is_file() else 0


def wait_until(true: Callable[[], object], what: str, timeout_s: float = 600.0) -> None:
    """Wait for something to become true; AssertionError that names it when it does not."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.01)
