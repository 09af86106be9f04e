"""`deepspeed --no_ssh` on two hosts: same losses as on one, a lost host is named, a second start goes on."""

import time
from pathlib import Path

import pytest

from tests.cluster.lab import Lab, Remote
from tests.cluster.runs import (
    CLUSTER,
    ROOT,
    SILENCE_S,
    STEPS,
    VARIABLES,
    check_same,
    documented,
    steps_done,
    wait_until,
)

pytestmark = pytest.mark.cluster


def start(lab: Lab, config: Path, output: Path) -> list[Remote]:
    """The documented command on each host, one rank there."""
    hostfile = lab.folder / "hostfile"
    hostfile.write_text((CLUSTER / "hostfile").read_text().replace("slots=8", "slots=1"))
    started = []
    for rank, host in enumerate(lab.hosts):
        words = {"launch/cluster/hostfile": hostfile, "N": rank, "CONFIG": config}
        (command,) = documented("no_ssh", **words)
        started.append(host.start([*command, f"output={output}"], ROOT, **VARIABLES))
    return started


def test_two_hosts_give_what_two_local_ranks_give(lab: Lab, config: Path, expected: Path, tmp_path: Path) -> None:
    ranks = start(lab, config, tmp_path / "made")
    assert [rank.wait() for rank in ranks] == [0, 0], "".join(rank.output for rank in ranks)
    for number, rank in enumerate(ranks):
        assert f"nnodes=2, num_local_procs=1, node_rank={number}" in rank.output
    check_same(tmp_path / "made", expected)


@pytest.mark.parametrize("lost", [1, 0])
def test_a_lost_host_is_named_and_a_second_start_goes_on(
    lost: int, lab: Lab, config: Path, expected: Path, tmp_path: Path
) -> None:
    output = tmp_path / "made"
    ranks = start(lab, config, output)
    wait_until(lambda: steps_done(output) > STEPS // 10, "a tenth of the steps")
    lab.hosts[lost].crash()
    crashed = time.monotonic()
    left = ranks[1 - lost]
    assert left.wait() == 2, left.output
    seconds = time.monotonic() - crashed
    print(f"{lab.hosts[lost].name} lost at step {steps_done(output)}; the other ended after {seconds:.1f} s")
    assert f"error: rank {lost} on {lab.hosts[lost].name} (process " in left.output
    assert "does not answer: last heard of" in left.output
    assert "run again to go on from the last checkpoint" in left.output
    assert seconds < 4 * SILENCE_S + 30
    assert STEPS // 10 < steps_done(output) < STEPS
    lab.hosts[lost].boot()
    again = start(lab, config, output)
    assert [rank.wait() for rank in again] == [0, 0], "".join(rank.output for rank in again)
    check_same(output, expected)
