"""accelerate's own command, as docs/cluster.md has it, starts the ranks of a stage; on one machine here."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cluster.runs import ROOT, VARIABLES, documented, write_config


@pytest.mark.slow
def test_the_documented_command_starts_two_ranks(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    changed = yaml.safe_load(config.read_text())
    changed["trainer"] |= {"max_steps": 2, "save_steps": 0}
    config.write_text(yaml.safe_dump(changed))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (command,) = documented("accelerate", CONFIG=config, N=0, node1="127.0.0.1")
    here = {"--num_machines": "1", "--num_processes": "2", "--main_process_port": str(port)}
    for option, value in here.items():
        command[command.index(option) + 1] = value
    done = subprocess.run(
        [*command, f"output={tmp_path / 'made'}"],
        cwd=ROOT,
        env=os.environ | VARIABLES,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    assert manifest["metrics"]["samples_seen"] == 64
    assert manifest["environment"]["ranks"] == "2"
