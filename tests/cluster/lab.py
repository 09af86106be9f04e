"""Hosts for tests: each has a network, a name, processes and mounts of its own, on a bridge inside one namespace.

A lab is a process in fresh network, mount and PID namespaces, and so is each host inside it. Whatever is started there
ends with that process, which ends with the process that made it, and the kernel then takes links and mounts away:
nothing has to be undone, and nothing of the machine itself is changed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

START_TIMEOUT_S = 20.0
# Command -> the Debian package that has it.
PACKAGES = {"ip": "iproute2", "nsenter": "util-linux", "setpriv": "util-linux"}


def missing(packages: Mapping[str, str]) -> str | None:
    """Why hosts cannot be made here, and what to do, in one line; None where they can.

    Args:
        packages: beside those of the lab itself: command -> Debian package.
    """
    if os.geteuid() != 0:
        return "the cluster tests make network namespaces: run make cluster as root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    needed = PACKAGES | dict(packages)
    wanted = {package for command, package in needed.items() if not shutil.which(command, path=path)}
    if wanted:
        install = f"apt-get install --no-install-recommends {' '.join(sorted(wanted))}"
        return f"the cluster tests need Debian packages: {install}"
    tried = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, text=True)
    return f"the cluster tests cannot make namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Remote:
    """A command at work on a host; its output goes to a file."""

    def __init__(self, entered: subprocess.Popen[bytes], log: Path) -> None:
        self._entered, self.log = entered, log

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def running(self) -> bool:
        return self._entered.poll() is None

    def wait(self, timeout_s: float = 600.0) -> int:
        """The exit code, negative for a signal; AssertionError with the output when it takes too long."""
        try:
            return self._entered.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s:.0f} s\n{self.output}") from None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the command itself, not to what entered the host for it."""
        for child in _children(self._entered.pid):
            os.kill(child, number)


class Host:
    """One host of a lab; `crash` and `boot` as often as wanted."""

    def __init__(self, lab: Lab, name: str, address: str) -> None:
        self.lab, self.name, self.address = lab, name, address
        self._init: int | None = None
        self._logs = 0

    def boot(self) -> None:
        """Plug the cable in and start the host's first process."""
        self.lab.run("ip", "link", "set", f"to-{self.name}", "up")
        space = ["unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        starter = self.lab.popen("ip", "netns", "exec", self.name, *space, "sleep", "infinity")
        # nsenter, what it forks into the lab, and what unshare forks
        self._init = _descendant(starter.pid, "sleep")
        self.run("hostname", self.name)
        self.run("mount", "-t", "tmpfs", "tmpfs", "/run")

    def crash(self) -> None:
        """Pull the cable, then kill everything at once: peers get no goodbye."""
        self.lab.run("ip", "link", "set", f"to-{self.name}", "down")
        assert self._init is not None
        os.kill(self._init, signal.SIGKILL)
        self._init = None

    def enter(self, command: Sequence[str], folder: Path, **variables: object) -> list[str]:
        """The command line that runs `command` on this host."""
        assert self._init is not None, f"{self.name} is down"
        into = ["nsenter", "--target", str(self._init), "--net", "--uts", "--pid", "--mount", "--"]
        given = [f"{name}={value}" for name, value in variables.items()]
        return [*into, "env", "--chdir", str(folder), *given, *command]

    def run(self, *command: str, folder: Path = Path("/"), **variables: object) -> str:
        """Run a short command to its end and return its standard output."""
        return _checked(self.enter(command, folder, **variables))

    def start(self, command: Sequence[str], folder: Path, **variables: object) -> Remote:
        """Start a command; its output goes to a file of its own."""
        self._logs += 1
        log = self.lab.folder / f"{self.name}-{self._logs}.log"
        with log.open("wb") as file:
            entered = subprocess.Popen(
                self.enter(command, folder, **variables), stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        return Remote(entered, log)


class Lab:
    """Hosts that reach one another by name, and nothing else. A context manager.

    Args:
        folder: for logs and `/etc/hosts`; every host sees it, as it sees all of the machine's files.
        names: of the hosts, in the order of their addresses 10.77.0.1, 10.77.0.2, ...
        aliases: other names of hosts, such as a Kubernetes service gives them.
    """

    def __init__(self, folder: Path, names: Sequence[str], aliases: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.hosts = [Host(self, name, f"10.77.0.{number}") for number, name in enumerate(names, 1)]
        self._aliases = aliases or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._init = 0

    def __enter__(self) -> Lab:
        self._start()
        return self

    def __exit__(self, *unused: object) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.kill(self._init, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _start(self) -> None:
        space = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        # Not even a killed pytest leaves hosts behind.
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = (self.folder / "lab.log").open("wb")
        command = ["setpriv", "--pdeathsig", "KILL", *space, "sleep", "infinity"]
        self._process = subprocess.Popen(command, stderr=self._log)
        self._init = _descendant(self._process.pid, "sleep")
        lines = ["127.0.0.1 localhost"]
        lines += [f"{host.address} {host.name} {self._aliases.get(host.name, '')}" for host in self.hosts]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        self.mount_file(self.folder / "hosts", "/etc/hosts")
        self.run("mount", "-t", "tmpfs", "tmpfs", "/run")  # ip netns keeps its names there
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "link", "add", "bridge", "type", "bridge")
        self.run("ip", "link", "set", "bridge", "up")
        for host in self.hosts:
            cable = f"to-{host.name}"
            self.run("ip", "netns", "add", host.name)
            self.run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            self.run("ip", "link", "set", cable, "master", "bridge")
            self.run("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            self.run("ip", "-n", host.name, "link", "set", "eth0", "up")
            self.run("ip", "-n", host.name, "link", "set", "lo", "up")
            host.boot()

    def mount_file(self, file: Path, place: str) -> None:
        """Have the lab, and hosts booted from now on, see `file` in place of the machine's."""
        self.run("mount", "--bind", str(file), place)

    def run(self, *command: str) -> str:
        """Run a short command in the lab, outside all hosts."""
        return _checked([*self._enter(), *command])

    def popen(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a command in the lab, outside all hosts."""
        return subprocess.Popen([*self._enter(), *command], stdin=subprocess.DEVNULL, stderr=self._log)

    def _enter(self) -> list[str]:
        return ["nsenter", "--target", str(self._init), "--net", "--mount", "--pid", "--"]


def _checked(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def _children(pid: int) -> Iterator[int]:
    with suppress(FileNotFoundError):
        yield from map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split())


def _descendant(pid: int, name: str) -> int:
    """The process of this name below `pid`, once it is there."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        below = [pid]
        while below:
            found = below.pop()
            with suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{found}/comm").read_text(encoding="utf-8").strip() == name:
                    return found
            below += _children(found)
        time.sleep(0.01)
    raise AssertionError(f"{name} did not start below process {pid}")
