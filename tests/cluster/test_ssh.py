"""`deepspeed --hostfile` over a real sshd on every host and pdsh: the ranks start, and a failure comes back."""

import subprocess
from pathlib import Path

import pytest

from tests.cluster.lab import Lab, Remote, missing
from tests.cluster.runs import CLUSTER, ROOT, VARIABLES, check_same, documented, wait_until

pytestmark = pytest.mark.cluster

PACKAGES = {"sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}
SSHD = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
"""
SSH = """
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking accept-new
"""


@pytest.fixture
def trusting(lab: Lab) -> Lab:
    """The lab with an sshd on every host; keys and settings are its own, nobody's ~/.ssh is touched."""
    if reason := missing(PACKAGES):
        pytest.skip(reason)
    folder = lab.folder / "ssh"
    folder.mkdir(mode=0o700)
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    for host in lab.hosts:
        host.run("mkdir", "-m", "755", "/run/sshd")
        host.run("mount", "--bind", str(folder / "ssh_config"), "/etc/ssh/ssh_config")
        host.start(["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")], folder)
    for host in lab.hosts:
        wait_until(lambda name=host.name: said_by(lab, name) == name, f"sshd of {host.name}", 30)
    return lab


def said_by(lab: Lab, name: str) -> str:
    """The name that a host says it has, asked over ssh from the first one."""
    return lab.hosts[0].run("sh", "-c", f"ssh {name} hostname || true").strip()


def start(lab: Lab, config: Path, *arguments: str) -> Remote:
    """The documented command, on the first host."""
    hostfile = lab.folder / "hostfile"
    hostfile.write_text((CLUSTER / "hostfile").read_text().replace("slots=8", "slots=1"))
    exported = lab.folder / "deepspeed_env"  # as ~/.deepspeed_env
    exported.write_text("".join(f"{name}={value}\n" for name, value in VARIABLES.items()))
    (command,) = documented("ssh", **{"launch/cluster/hostfile": hostfile, "CONFIG": config})
    return lab.hosts[0].start([*command, *arguments], ROOT, DS_ENV_FILE=exported, **VARIABLES)


def test_ranks_start_over_ssh(trusting: Lab, config: Path, expected: Path, tmp_path: Path) -> None:
    started = start(trusting, config, f"output={tmp_path / 'made'}")
    assert started.wait() == 0, started.output
    assert "node1: " in started.output
    assert "node2: " in started.output  # pdsh says who prints
    check_same(tmp_path / "made", expected)


def test_a_mistake_comes_back(trusting: Lab, config: Path, tmp_path: Path) -> None:
    started = start(trusting, config, f"output={tmp_path / 'made'}", "seeed=1")
    assert started.wait() == 2, started.output
    assert "error: command line: seeed is not a known key; did you mean seed?" in started.output
