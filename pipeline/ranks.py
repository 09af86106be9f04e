"""Starts the ranks of one stage as processes of this machine, and turns a failed one into one error.

For many machines use `deepspeed`, `torchrun` or `srun` with the scripts in launch/; the ranks cannot tell them apart.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mmfoundry.pipeline.errors import PREEMPTED_EXIT_CODE, MmfoundryError
from mmfoundry.pipeline.signals import listening

# A rank writes its user error here instead of printing it: the starter prints it, once.
ERROR_FILE = "MMFOUNDRY_ERROR_FILE"
# Set where the rank's standard input is a pipe from its starter: its end means that the starter is gone.
WATCH_STDIN = "MMFOUNDRY_WATCH_STDIN"
_POLL_S = 0.1
_GRACE_S = 10.0


def start_ranks(module: str, arguments: list[str], processes: int) -> None:
    """Run `python -m module arguments` once a rank and wait for all of them.

    Rank 0 shares this process's output; what the others print is kept aside and shown if they fail. On the first
    failure the others are ended. Ranks end themselves when this process is killed; SIGTERM and SIGUSR1 reach them.

    Args:
        module: importable module that runs one rank and reads `RANK`, `WORLD_SIZE` and so on from its environment.
        arguments: its command line.
        processes: how many ranks.
    Raises:
        MmfoundryError: a rank failed; its own error where it left one.
        SystemExit: code 85: the ranks were told to stop; those that train have saved their state.
    """
    with tempfile.TemporaryDirectory(prefix="mmfoundry-ranks-") as name:
        folder = Path(name)
        port = _free_port()
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            with _passing_on(ranks) as told:
                for rank in range(processes):
                    ranks.append(_start(module, arguments, rank, processes, port, folder))
                failed = _wait(ranks)
        finally:
            _end(ranks)
        # A rank that does not listen yet is ended by the signal: nothing is lost, and it is to be started again.
        code = 0 if failed is None else ranks[failed].returncode
        if code == PREEMPTED_EXIT_CODE or -code in told:
            raise SystemExit(PREEMPTED_EXIT_CODE)
        if failed is not None:
            raise MmfoundryError(_reason(module, failed, code, folder))


@contextmanager
def _passing_on(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[set[int]]:
    """Send what tells this process to stop to the ranks instead; the signals that came are gathered in the set."""
    told: set[int] = set()

    def pass_on(number: int, frame: FrameType | None) -> None:
        told.add(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    with listening(pass_on):  # a scheduler sends them to the starter alone
        yield told


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(
    module: str, arguments: list[str], rank: int, processes: int, port: int, folder: Path
) -> subprocess.Popen[bytes]:
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        ERROR_FILE: folder / f"error-{rank}.txt",
        WATCH_STDIN: 1,
        # Else every rank starts a thread for each core, and they wait for one another.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // processes)),
    }
    with (folder / f"log-{rank}.txt").open("wb") as log:
        output = None if rank == 0 else log
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | {key: str(value) for key, value in variables.items()},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
        )


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """The first rank that failed; None when all ended well."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        saved = [rank for rank in failed if codes[rank] == PREEMPTED_EXIT_CODE]
        if len(failed) > len(saved):
            return next(rank for rank in failed if rank not in saved)
        if failed and None not in codes:  # the others save a moment later
            return failed[0]
        if all(code == 0 for code in codes):
            return None
        time.sleep(_POLL_S)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    deadline = time.monotonic() + _GRACE_S
    for rank in ranks:
        try:
            rank.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
        if rank.stdin is not None:
            rank.stdin.close()


def _reason(module: str, rank: int, code: int, folder: Path) -> str:
    # The rank that failed first may only have lost the one with the reason.
    for file in [folder / f"error-{rank}.txt", *sorted(folder.glob("error-*.txt"))]:
        if file.is_file():
            return file.read_text(encoding="utf-8")
    log = (folder / f"log-{rank}.txt").read_text(encoding="utf-8", errors="replace")
    print("".join(log.splitlines(keepends=True)[-40:]), file=sys.stderr, end="")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{module.rpartition('.')[2]}: rank {rank} ended with {how}; run again to go on from the last checkpoint"


def leave_error(text: str) -> None:
    """Print an error line, or leave it for the process that started this rank, which prints it once."""
    path = os.environ.get(ERROR_FILE)
    if path:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    else:
        print(f"error: {text}", file=sys.stderr, flush=True)


def end_with_starter() -> None:
    """In a rank: end this process when the process that started it is gone, killed ones included."""
    if os.environ.pop(WATCH_STDIN, None) is None:
        return

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="end-with-starter", daemon=True).start()
