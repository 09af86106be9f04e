"""The sides seen from the script: each a process group that runs only while it is its turn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

_SERVE = Path(__file__).with_name("serve.py")


class Side:
    """One loader in processes of its own; stopped by SIGSTOP, workers and all, whenever it is not asked anything.

    So the other sides' read-ahead takes nothing from the one that is timed, and a side goes on where it was stopped:
    with its queues as full as its workers keep them.
    """

    def __init__(self, name: str, python: Path) -> None:
        """Start importing what the side needs; `wait` until it has."""
        self.name = name
        # one thread a process: "2 workers" is to mean the same everywhere
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        # nothing of what the sides do needs a network, and a look-up that waits for one would be timed
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [str(python), str(_SERVE), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **one, **offline},
            start_new_session=True,
            text=True,
        )

    def wait(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            SystemExit: the side died; its own message is above.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self._process.wait()}; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **order: Any) -> dict[str, Any]:
        """Let the side run until it has answered an order; see serve.py for the orders."""
        assert self._process.stdin is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self.wait()
        os.killpg(self._process.pid, signal.SIGSTOP)
        return answer

    def memory_mb(self) -> float:
        """Proportional set size of all processes of the side, so that pages which they share count once; MB."""
        main = psutil.Process(self._process.pid)
        return sum(one.memory_full_info().pss for one in [main, *main.children(recursive=True)]) / 1e6

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        """End the group; kindly first, so that shared memory is unlinked by those who made it."""
        group = self._process.pid
        for number, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 0.0)):
            try:
                os.killpg(group, number)
                os.killpg(group, signal.SIGCONT)  # a stopped process does not see a signal
            except ProcessLookupError:
                break
            end = time.monotonic() + patience_s
            while time.monotonic() < end and self._process.poll() is None:
                time.sleep(0.05)
        self._process.communicate()
