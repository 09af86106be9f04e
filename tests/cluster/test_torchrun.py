"""torchrun and accelerate on two hosts; what the Kubernetes job runs in its pods, told to stop and started again."""

import signal
from pathlib import Path

import pytest
import yaml

from tests.cluster.lab import Lab, Remote
from tests.cluster.runs import CLUSTER, ROOT, STEPS, VARIABLES, check_same, documented, steps_done, wait_until

pytestmark = pytest.mark.cluster


def finish(ranks: list[Remote]) -> list[int]:
    codes = [rank.wait() for rank in ranks]
    print("".join(rank.output[-3000:] for rank in ranks))
    return codes


def smaller(command: list[str]) -> list[str]:
    """The same command with one rank a host instead of eight."""
    small = {"8": "1", "16": "2", "--nproc-per-node=8": "--nproc-per-node=1"}
    return [small.get(word, word) for word in command]


def test_a_dry_run_starts_nothing(lab: Lab, config: Path, tmp_path: Path) -> None:
    (command,) = documented("dry-run", CONFIG=config)
    shown = lab.hosts[0].start([*command, f"output={tmp_path / 'made'}"], ROOT, **VARIABLES)
    assert shown.wait() == 0, shown.output
    assert shown.output.count(f"pretrain -> {tmp_path / 'made'}: run, not run yet") == 1
    assert "train_batch_size: 32" in shown.output  # of our config
    assert '"train_batch_size": 32' in shown.output  # of DeepSpeed's
    assert [*tmp_path.glob("made*")] == []


def test_torchrun_finds_the_hosts_by_rendezvous(lab: Lab, config: Path, expected: Path, tmp_path: Path) -> None:
    (command,) = documented("torchrun", CONFIG=config)
    output = f"output={tmp_path / 'made'}"
    assert finish([host.start([*smaller(command), output], ROOT, **VARIABLES) for host in lab.hosts]) == [0, 0]
    check_same(tmp_path / "made", expected)


def test_accelerate_starts_them_too(lab: Lab, config: Path, expected: Path, tmp_path: Path) -> None:
    ranks = []
    for number, host in enumerate(lab.hosts):
        (command,) = documented("accelerate", CONFIG=config, N=number)
        ranks.append(host.start([*smaller(command), f"output={tmp_path / 'made'}"], ROOT, **VARIABLES))
    assert finish(ranks) == [0, 0]
    check_same(tmp_path / "made", expected)


def test_pods_of_the_kubernetes_job_save_and_go_on(config: Path, expected: Path, tmp_path: Path) -> None:
    _, job = yaml.safe_load_all((CLUSTER / "kubernetes-job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    output = tmp_path / "made"
    places = {"/config/pretrain.yaml": str(config), "output=/runs/pretrain": f"output={output}"}
    command = [places.get(word, word) for word in smaller(container["command"])]
    assert {*places.values(), "--nproc-per-node=1"} == {*command} - {*container["command"]}
    names = [f"{job['metadata']['name']}-{index}" for index in range(job["spec"]["completions"])]
    with Lab(tmp_path / "lab", names, aliases={name: f"{name}.pretrain" for name in names}) as lab:
        pods = [host.start(command, ROOT, **VARIABLES) for host in lab.hosts]
        wait_until(lambda: steps_done(output) > STEPS // 10, "a tenth of the steps")
        pods[1].signal(signal.SIGTERM)  # its node is drained
        assert finish(pods) == [85, 85]
        assert STEPS // 10 < steps_done(output) < STEPS
        again = [host.start(command, ROOT, **VARIABLES) for host in lab.hosts]
        assert finish(again) == [0, 0]
    check_same(output, expected)
