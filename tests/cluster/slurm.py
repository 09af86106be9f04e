"""A real Slurm from Debian's packages on the hosts of a lab: munge, a controller, and a daemon on every host."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tests.cluster.lab import Lab, Remote
from tests.cluster.runs import ROOT, VARIABLES, wait_until

PACKAGES = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
}
# Jobs of partition `first` take the hosts from those of `rest`, which have GraceTime to save and are put back.
CONF = """
ClusterName=lab
SlurmctldHost=node1(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=60
SchedulerParameters=sched_min_interval=0,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=node1 NodeAddr=10.77.0.1 CPUs=2 Gres=gpu:1
NodeName=node2 NodeAddr=10.77.0.2 CPUs=2 Gres=gpu:1
PartitionName=rest Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=first Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
GRES = "NodeName=node[1-2] Name=gpu File=/dev/null\n"  # a GPU to be counted; ranks here never touch it


class Slurm:
    """The cluster; it ends with the lab."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.folder = lab, lab.folder / "slurm"
        (self.folder / "state").mkdir(parents=True)
        self.folder.chmod(0o755)
        self.conf = self.folder / "slurm.conf"
        self.conf.write_text(CONF.format(folder=self.folder))
        (self.folder / "gres.conf").write_text(GRES)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self._key = self.folder / "munge.key"
        self._key.write_bytes(os.urandom(128))
        self._key.chmod(0o400)
        self.daemons: list[Remote] = []
        self._boot()

    def _boot(self) -> None:
        for host in self.lab.hosts:
            host.run("mkdir", "-m", "755", "-p", "/run/munge")
            place = [f"--seed-file=/run/munge/seed-{host.name}", "--log-file=/run/munge/log"]
            self._daemon(host.name, "munged", "--foreground", f"--key-file={self._key}", *place)
        wait_until(lambda: all(self._munge_works(host.name) for host in self.lab.hosts), "munge", 30)
        self._daemon("node1", "slurmctld", "-D", "-f", str(self.conf))
        for host in self.lab.hosts:
            self._daemon(host.name, "slurmd", "-D", "-f", str(self.conf))
        wait_until(self._idle, "both nodes idle", 60)

    def _daemon(self, name: str, *command: str) -> None:
        host = next(host for host in self.lab.hosts if host.name == name)
        self.daemons.append(host.start(command, self.folder, **VARIABLES))

    def _munge_works(self, name: str) -> bool:
        host = next(host for host in self.lab.hosts if host.name == name)
        return host.run("sh", "-c", "test -S /run/munge/munge.socket.2 && echo there || true").strip() == "there"

    def _idle(self) -> bool:
        for daemon in self.daemons:
            assert daemon.running(), daemon.output
        ask = ["sh", "-c", "sinfo --noheader --Node --partition rest --format=%t || true"]
        return self.run(*ask).split() == ["idle"] * len(self.lab.hosts)

    def run(self, *command: str) -> str:
        """A Slurm command on node1."""
        return self.lab.hosts[0].run(*command, folder=ROOT, SLURM_CONF=self.conf, **VARIABLES)

    def start(self, command: list[str]) -> Remote:
        """A command of Slurm's that takes its time."""
        return self.lab.hosts[0].start(command, ROOT, SLURM_CONF=self.conf, **VARIABLES)

    def submit(self, command: list[str]) -> str:
        """sbatch; the job's number."""
        said = self.run(*command)
        found = re.search(r"Submitted batch job (\d+)", said)
        assert found, said
        return found[1]

    def state(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        told = self.run("scontrol", "show", "job", "--oneliner", job)
        return dict(part.split("=", 1) for part in told.split() if "=" in part)

    def troubles(self) -> str:
        """What the daemons said, for a message."""
        return "".join(f"--- {daemon.log.name}\n{daemon.output[-4000:]}" for daemon in self.daemons)


def log_of(job: str, folder: Path) -> str:
    """What a job printed."""
    return next(folder.glob(f"*-{job}.log")).read_text(encoding="utf-8", errors="replace")
