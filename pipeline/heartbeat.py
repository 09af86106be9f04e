"""A rank that hangs or dies ends the run in bounded time, with a line that names it.

Collectives know nothing of each other's ranks: when one is lost, the others wait until a timeout of half an hour, and
then say that they waited. So each rank has a thread that signs in every few seconds at the store through which the
ranks found one another (`MASTER_ADDR`, `MASTER_PORT`), beside all collectives, with what it is doing. Rank 0 looks
after the others, the others after rank 0. A rank counts as lost when it has not signed in for `silence_timeout_s`
(stopped, dead, its machine gone), or at once when its process is gone from the same machine; and as hung when
it signs in but has been busy with the same thing for `step_timeout_s`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from pydantic import Field

from mmfoundry.pipeline.config import Config
from mmfoundry.pipeline.distributed import Runtime, barrier
from mmfoundry.pipeline.errors import MmfoundryError
from mmfoundry.pipeline.ranks import leave_error

LOST_EXIT_CODE = 2  # as of every error that the user is told in one line
_SIGN_INS = 6  # in the time of one timeout
_GRACE_S = 5.0  # for a rank's own error to come through before the others end because of it


class HeartbeatConfig(Config):
    """When a rank counts as lost."""

    silence_timeout_s: float = Field(
        60.0, ge=0, description="seconds without a sign of a rank after which all others end the run; 0: never"
    )
    step_timeout_s: float = Field(
        1800.0, gt=0, description="seconds that a rank may be busy with one part of a step (data, losses, update, save)"
    )


class Doing(IntEnum):
    """What a rank is at, in the order of a step: of several that wait, the one furthest behind is waited for."""

    DATA = 0
    LOSSES = 1
    JOINING = 2
    UPDATE = 3
    EVALUATION = 4
    CHECKPOINT = 5

    @property
    def text(self) -> str:
        """In words."""
        return (
            "waiting for data",
            "computing losses and gradients",
            "joining its losses with those of the other ranks",
            "updating the weights",
            "evaluating",
            "writing a checkpoint",
        )[self]


class LostRank(MmfoundryError):
    """A rank of the run hangs or is gone."""


@dataclass(frozen=True)
class _Sign:
    """What a rank writes when it signs in; `count` grows each time."""

    rank: int
    host: str
    place: str
    pid: int
    count: int = 0
    step: int = 0
    doing: int = 0
    busy_s: float = 0.0
    ended: str | None = None  # empty: as it should


class Heartbeat:
    """Signs this rank in, looks after the others, and ends this process when one is lost.

    Args:
        config: when a rank counts as lost.
        runtime: this process among the ranks; alone, nothing is done.
        folder: where the stacks of a hung run are written.
    """

    def __init__(self, config: HeartbeatConfig, runtime: Runtime, folder: Path) -> None:
        self._config, self._runtime, self._folder = config, runtime, folder
        self._interval = min(config.silence_timeout_s / _SIGN_INS, 10.0)
        self._me = _Sign(runtime.rank, socket.gethostname(), _place(), os.getpid())
        # Written by the main thread alone, in one go: step, what is done, since when; and how it ended.
        self._state = (0, Doing.DATA, time.monotonic())
        self._ended: str | None = None
        self._heard: dict[int, tuple[_Sign, float]] = {}
        self._count = 0
        self._verdict: str | None = None
        self._found = threading.Event()  # a verdict
        self._over = threading.Event()
        self._explains = False  # the main thread waits for the verdict, and says it itself
        self._threads: list[threading.Thread] = []
        self._active = runtime.group is not None and config.silence_timeout_s > 0

    def __enter__(self) -> Heartbeat:
        """Begin to sign in; a collective."""
        if self._active:
            self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        lost = self._explain(error)
        self._stop(error)
        if lost is not None:
            raise lost from error

    def _start(self) -> None:
        run = torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(time.time_ns() % 2**63))
        run = run.to(self._runtime.device)
        dist.broadcast(run, 0, group=self._runtime.group)  # a launcher's store may remember an earlier run
        self._prefix = f"mmfoundry/heartbeat/{int(run)}"
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=max(self._config.silence_timeout_s, 1.0)),
        )
        if self._runtime.is_main:
            self._store.set(f"{self._prefix}/verdict", "")
        self.at(0, Doing.DATA)  # what came before is not counted
        self._sign_in()
        barrier(self._runtime.group)  # from here on every key is there
        for work in (self._keep_signing_in, self._keep_judging):
            self._threads.append(threading.Thread(target=work, name=work.__name__, daemon=True))
            self._threads[-1].start()

    def at(self, step: int, doing: Doing) -> None:
        """Say what this rank begins to do now.

        Args:
            step: being made, from 1.
            doing: which part of it.
        """
        self._state = (step, doing, time.monotonic())

    def _stop(self, error: BaseException | None) -> None:
        """Sign in for the last time: this rank leaves as it should, or with an error."""
        if not self._threads:
            return
        as_it_should = error is None or isinstance(error, SystemExit)
        self._ended = "" if as_it_should else f"{type(error).__name__}: {error}"[:300]
        self._over.set()
        self._threads[0].join(2 * self._interval + 1.0)  # signs in once more; not if the store is gone
        self._threads.clear()

    def _explain(self, error: BaseException | None) -> LostRank | None:
        """Which rank was lost, if that is what an error comes from; waits until that can be told."""
        lost_connection = isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)
        if not self._threads or not lost_connection:
            return None
        self._explains = True
        self._found.wait(self._config.silence_timeout_s + 4 * self._interval)
        return LostRank(self._verdict) if self._verdict else None

    def _keep_signing_in(self) -> None:
        while True:
            over = self._over.is_set()
            try:
                self._sign_in()
                self._listen()
            except (RuntimeError, OSError, ValueError):  # the store is gone, with the process that had it
                if over or self._over.is_set():
                    return
                self._lost_store()
            if over:
                return
            self._over.wait(self._interval)

    def _sign_in(self) -> None:
        self._count += 1
        self._store.set(f"{self._prefix}/{self._me.rank}", json.dumps(asdict(self._sign())))

    def _sign(self) -> _Sign:
        step, doing, since = self._state
        busy_s = time.monotonic() - since
        return replace(self._me, count=self._count, step=step, doing=int(doing), busy_s=busy_s, ended=self._ended)

    def _listen(self) -> None:
        watched = range(1, self._runtime.world_size) if self._runtime.is_main else [0]
        keys = [f"{self._prefix}/{rank}" for rank in watched]
        *signs, verdict = self._store.multi_get([*keys, f"{self._prefix}/verdict"])
        now = time.monotonic()
        for text in signs:
            sign = _Sign(**json.loads(text))
            before = self._heard.get(sign.rank)
            if before is None or before[0].count != sign.count:
                self._heard[sign.rank] = (sign, now)
        if verdict:
            self._decide(verdict.decode())

    def _lost_store(self) -> None:
        """Rank 0 has the store, or is next to who has it: unless it signs in again, it is lost."""
        found = self._heard.get(0)
        if found is not None and _gone(found[0], self._me.place):
            self._decide(self._silent(found[0], found[1]))

    def _keep_judging(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(self._interval):
            now = time.monotonic()
            if now - looked > self._interval + self._config.silence_timeout_s / 2:
                # This process was stopped itself, perhaps with all the others: ask them anew.
                self._heard = {rank: (sign, now) for rank, (sign, _) in self._heard.items()}
            looked = now
            text = self._judge(now)
            if text is not None and not self._over.is_set():
                self._decide(text)

    def _judge(self, now: float) -> str | None:
        for sign, heard in list(self._heard.values()):
            if sign.ended == "":
                continue
            if sign.ended and now - heard > _GRACE_S:
                return f"rank {sign.rank} on {sign.host} ended at step {sign.step}: {sign.ended}"
            if sign.ended is None and (now - heard > self._config.silence_timeout_s or _gone(sign, self._me.place)):
                return self._silent(sign, heard)
        signs = [self._sign(), *(sign for sign, _ in self._heard.values() if sign.ended is None)]
        if self._runtime.is_main and max(sign.busy_s for sign in signs) > self._config.step_timeout_s:
            last = min(signs, key=lambda sign: (sign.step, sign.doing))
            return (
                f"rank {last.rank} on {last.host} (process {last.pid}) hangs: for {last.busy_s:.0f} s it has been "
                f"{Doing(last.doing).text} at step {last.step}{self._waiting(last)}; its stack is in "
                f"{self._folder}/hung-{last.rank}.txt"
            )
        return None

    def _silent(self, sign: _Sign, heard: float) -> str:
        what = "is gone" if _gone(sign, self._me.place) else "does not answer"
        return (
            f"rank {sign.rank} on {sign.host} (process {sign.pid}) {what}: last heard of "
            f"{time.monotonic() - heard:.1f} s ago at step {sign.step}, {Doing(sign.doing).text}{self._waiting(sign)}"
        )

    def _waiting(self, lost: _Sign) -> str:
        if lost.rank == self._me.rank:
            return ""
        step, doing, _ = self._state
        return f"; rank {self._me.rank} waits for it at step {step}, {doing.text}"

    def _decide(self, text: str) -> None:
        """Tell the others, if that is this rank's part, and end."""
        if self._found.is_set():
            return
        self._verdict = text if "run again" in text else f"{text}; run again to go on from the last checkpoint"
        self._found.set()
        if self._runtime.is_main:
            told = threading.Thread(target=self._tell, daemon=True)
            told.start()
            self._over.wait(3 * self._interval)  # the others read it before the store ends with this process
        if not self._explains:
            self._end()

    def _tell(self) -> None:
        with suppress(RuntimeError):
            self._store.set(f"{self._prefix}/verdict", self._verdict or "")

    def _end(self) -> NoReturn:
        """End this process, whose main thread cannot be reached: it waits in a collective."""
        with suppress(OSError), (self._folder / f"hung-{self._me.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file)
        leave_error(f"{self._verdict}")
        sys.stderr.flush()
        os._exit(LOST_EXIT_CODE)


def _place() -> str:
    """What tells whether another process can be looked for here: the machine and its table of processes."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {os.getpid()}"


def _gone(sign: _Sign, place: str) -> bool:
    """Whether a process of this machine has ended; False for those of other machines."""
    if sign.place != place:
        return False
    try:
        state = Path(f"/proc/{sign.pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except OSError:
        return True
    return state.split()[0] in "ZX"
