"""A Ray cluster of several nodes on this machine, each started as a user would start it on a machine of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_STORE_BYTES = 80_000_000  # about the least that Ray takes


class Cluster:
    """Its address, and the `ray start --block` process of each node."""

    def __init__(self, address: str):
        self.address = address
        self.nodes: list[subprocess.Popen[bytes]] = []


@contextmanager
def cluster(nodes: int, cpus: int = 1, gpus: int = 0) -> Iterator[Cluster]:
    """Nodes with so many cores each; `gpus` are only said to be there."""
    port = free_port()
    found = Cluster(f"127.0.0.1:{port}")
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets need a short path
    common = [f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--object-store-memory={_STORE_BYTES}", "--block"]
    common += ["--disable-usage-stats", "--include-log-monitor=false"]
    head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}"]
    try:
        for number in range(nodes):
            one = head if number == 0 else [f"--address={found.address}"]
            log = open(Path(folder) / f"node-{number}.log", "wb")  # noqa: SIM115 (the node's)
            with log:
                found.nodes.append(start([*one, "--node-ip-address=127.0.0.1", *common], log.fileno()))
            wait_for(lambda: answers(port))
        yield found
    finally:
        for node in reversed(found.nodes):
            end(node)
            lose(node)  # what it left behind
        shutil.rmtree(folder, ignore_errors=True)


def start(arguments: list[str], log: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION": "0.1"}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments]
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def end(node: subprocess.Popen[bytes]) -> None:
    """End a node, as `ray stop` would."""
    if node.poll() is None:
        node.terminate()  # it ends the rest of the node itself, and more quickly than if all of it is told
    try:
        node.wait(20)
    except subprocess.TimeoutExpired:
        lose(node)


def lose(node: subprocess.Popen[bytes]) -> None:
    """End a node as a power cut would: all its processes at once."""
    with suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def wait_for(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)
