"""Who makes batches: this thread, threads, or worker processes. All hand on the same batches in the same order.

Worker processes are started afresh (spawn): a fork of a process with threads may hang. A task is a position, sent as
JSON over a socket of the worker's own; the answer is the layout of a batch that lies in shared memory. So nothing is
pickled for a sample or a batch, only, once, what makes batches. A worker that is killed closes its socket, which is
noticed at once: another takes its place and makes the same batches, unless one position ends two workers.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from itertools import count, islice
from multiprocessing import connection, reduction, util
from multiprocessing.connection import Connection
from typing import Any

from mmfoundry.data.batch_maker import BatchMaker, Begun, Made
from mmfoundry.data.shared_batch import Slot, pack, unpack
from mmfoundry.data.tally import Skip
from mmfoundry.pipeline import errors
from mmfoundry.pipeline.errors import ConfigError, MmfoundryError

_MAX_DEATHS = 2  # workers that one batch may end
_END_S = 0.2  # seconds that workers get to end by themselves


class WorkerDied(MmfoundryError):
    """A worker process ended before its work was done, and starting another did not help."""


class WorkerFailed(RuntimeError):
    """An exception in a worker process that is no user error; its traceback is in the notes."""


def in_this_thread(maker: BatchMaker, start: int) -> Generator[Made, None, None]:
    """Steps from `start` to the end of the order, each made when it is asked for."""
    for each in steps(maker, start):
        yield maker.make(each)


def steps(maker: BatchMaker, start: int) -> Iterator[int]:
    """The first positions of the steps from `start` to the end of the order, if it has one."""
    return iter(range(start, maker.end, maker.batch_size)) if maker.end is not None else count(start, maker.batch_size)


def in_threads(maker: BatchMaker, start: int, workers: int, prefetch: int) -> Generator[Made, None, None]:
    """Steps from `start` to the end of the order, made by `workers` threads, together `workers * prefetch` ahead.

    All threads work on the step that is due next, sample by sample, and who waits for it works on it, too: a step that
    is not there in time is there the sooner, the first one above all.
    """
    todo = steps(maker, start)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")

    def begin(each: int) -> Begun:
        begun = maker.begin(each)
        for _ in range(workers):
            pool.submit(begun.work)
        return begun

    ahead: deque[Begun] = deque()
    try:
        ahead.extend(map(begin, islice(todo, workers * prefetch)))
        while ahead:
            ahead[0].work()
            made = ahead.popleft().made()
            ahead.extend(map(begin, islice(todo, 1)))
            yield made
            del made  # else its memory is not free while the next is waited for
    finally:
        for begun in ahead:
            begun.stop()
        pool.shutdown(wait=True, cancel_futures=True)


def in_processes(maker: BatchMaker, start: int, workers: int, prefetch: int) -> Generator[Made, None, None]:
    """Steps from `start` to the end of the order, made by `workers` processes, each at most `prefetch` batches ahead.

    A batch's arrays lie in memory that is used again once the last of them is gone.

    Raises:
        ConfigError: `encode` or `collate` cannot be sent to a process.
        WorkerDied: a worker did not come up, or two ended on the same batch.
        WorkerFailed: an exception in a worker that is no user error; user errors come as themselves.
    """
    todo = steps(maker, start)
    team = _Team(maker, workers)
    try:
        ahead = deque(map(team.assign, islice(todo, workers * prefetch)))
        while ahead:
            made = team.receive(ahead.popleft())
            ahead.extend(map(team.assign, islice(todo, 1)))
            yield made
            del made
    finally:
        team.close()


class _Team:
    """The worker processes, what each has been asked for, and what has come back."""

    def __init__(self, maker: BatchMaker, workers: int):
        self._maker = maker
        self._payload = _payload(maker)
        self._workers = [_Worker() for _ in range(workers)]
        for worker in self._workers:  # all have started by now
            worker.send(self._payload)
        self._done: dict[int, Made] = {}
        self._deaths: dict[int, int] = {}
        # before multiprocessing's own end of its children, which would wait for ones that ignore signals
        self._at_exit = util.Finalize(self, _end, args=(self._workers,), exitpriority=100)

    def assign(self, start: int) -> int:
        """Have the step made by the worker that has the least to do; returns `start`."""
        min(self._workers, key=lambda worker: len(worker.asked)).ask(start)
        return start

    def receive(self, start: int) -> Made:
        """Wait for a step that was handed out."""
        while start not in self._done:
            of = {worker.connection: worker for worker in self._workers}
            for ready in connection.wait(list(of)):
                worker = of[ready]  # type: ignore[index]
                try:
                    message = json.loads(worker.connection.recv_bytes())
                except (EOFError, OSError):
                    self._replace(worker)
                    continue
                if "error" in message:
                    raise _raised(message["error"])
                self._done[message["start"]] = worker.take(message)
        self._deaths.pop(start, None)
        return self._done.pop(start)

    def _replace(self, worker: _Worker) -> None:
        """Start another in the place of one that died, and ask it for what was left undone.

        Raises:
            WorkerDied: it never came up, or its batch has ended a worker before.
        """
        exit_code, position = worker.bury()
        how = _how(exit_code)
        if not worker.came_up and exit_code is not None and exit_code >= 0:
            raise WorkerDied(
                f"a worker process of the loader ended with {how} before its first batch; its traceback is above. "
                "A script that starts worker processes needs its code under `if __name__ == '__main__':`"
            )
        first = worker.asked[0] if worker.asked else None
        if first is not None:
            self._deaths[first] = self._deaths.get(first, 0) + 1
            if self._deaths[first] >= _MAX_DEATHS:
                at = f"at sample {self._maker.named(position)}" if position is not None else "before its first sample"
                raise WorkerDied(
                    f"{_MAX_DEATHS} worker processes of the loader ended on the same batch, the last with {how} {at}; "
                    "if memory ran out, lower num_workers, prefetch or cache_bytes, otherwise look at this sample"
                )
        warnings.warn(f"a worker process of the loader ended with {how}; another goes on", RuntimeWarning, stacklevel=2)
        new = _Worker()
        new.send(self._payload)
        self._workers[self._workers.index(worker)] = new
        for start in worker.asked:
            new.ask(start)

    def close(self) -> None:
        """End all workers; what they were making is dropped."""
        self._at_exit()


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()  # the end of their input: those that wait for work end by themselves
    deadline = time.monotonic() + _END_S
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():  # in the middle of a batch that nobody waits for
            worker.process.kill()
        worker.process.join()


class _Worker:
    """One worker process, seen from the consumer."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs,), name="loader", daemon=True)
        self.process.start()
        theirs.close()  # else the end of the worker would not be the end of its messages
        self.asked: deque[int] = deque()  # in this order; the first is being made
        self.came_up = False
        self._slots: list[Slot] = []
        self._slot_of: dict[int, int] = {}
        self._free: deque[int] = deque()

    def ask(self, start: int) -> None:
        """Ask for a step; one more slot is made where all are held by batches in use or under way."""
        new = not self._free
        if new:
            self._slots.append(Slot())
            self._free.append(len(self._slots) - 1)
        slot = self._free.popleft()
        self.asked.append(start)
        self._slot_of[start] = slot
        self.send(json.dumps({"start": start, "slot": slot, "new": new}).encode())
        if new:
            with suppress(OSError):  # it died; that is seen when its answers are read
                reduction.send_handle(self.connection, self._slots[slot].descriptor, self.process.pid)

    def send(self, data: bytes) -> None:
        """Write to the worker."""
        with suppress(OSError):  # it died; that is seen when its answers are read
            self.connection.send_bytes(data)

    def take(self, message: dict[str, Any]) -> Made:
        """The batch that the worker says is ready."""
        start = message["start"]
        self.came_up = True
        self.asked.remove(start)
        number = self._slot_of.pop(start)
        skips = [Skip(**skip) for skip in message["skips"]]
        if not message["layout"]:  # given up, or nothing of the last step is this rank's
            self._free.append(number)
            return Made(None if message["layout"] is None else {}, message["drawn"], skips)
        data = self._slots[number].view(message["size"])
        weakref.finalize(data, self._free.append, number).atexit = False
        return Made(unpack(message["layout"], data), message["drawn"], skips)

    def bury(self) -> tuple[int | None, int | None]:
        """After its death: its exit code, and the position it was working on."""
        self.process.join()
        self.connection.close()
        slot = self._slot_of.get(self.asked[0]) if self.asked else None
        return self.process.exitcode, None if slot is None else self._slots[slot].marked()


def work(pipe: Connection) -> None:
    """The life of a worker process: make what is asked for until the other end is closed.

    Signals that tell a run to stop go to every process of a terminal or a job; here they are for the consumer to act
    on, who may want the batches up to its last step.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    _one_thread()
    slots: list[Slot] = []
    try:
        maker: BatchMaker = reduction.ForkingPickler.loads(_received(pipe))
        while True:
            task = json.loads(_received(pipe))
            if task["new"]:
                slots.append(Slot(reduction.recv_handle(pipe)))
            _send(pipe, _answer(maker, task["start"], slots[task["slot"]]))
    except _Left:
        return
    except Exception as error:
        with suppress(_Left):
            _send(pipe, {"error": _described(error)})
        raise SystemExit(1) from error  # quietly: the consumer shows it


def _one_thread() -> None:
    """Have torch compute in this thread alone, now or when it is imported: the cores are shared out by workers."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


class _Left(Exception):
    """The consumer is gone."""


def _received(pipe: Connection) -> bytes:
    try:
        return pipe.recv_bytes()
    except (EOFError, OSError) as error:
        raise _Left from error


def _send(pipe: Connection, message: dict[str, Any]) -> None:
    try:
        pipe.send_bytes(json.dumps(message).encode())
    except OSError as error:
        raise _Left from error


def _answer(maker: BatchMaker, start: int, slot: Slot) -> dict[str, Any]:
    slot.clear()
    made = maker.make(start, slot)
    layout = None if made.batch is None else pack(made.batch, slot)
    slot.clear()
    skips = [asdict(skip) for skip in made.skips]
    return {"start": start, "drawn": made.drawn, "skips": skips, "layout": layout, "size": slot.size}


def _payload(maker: BatchMaker) -> bytes:
    try:
        return bytes(reduction.ForkingPickler.dumps(maker))
    except (reduction.pickle.PicklingError, AttributeError, TypeError) as error:  # type: ignore[attr-defined]
        raise ConfigError(
            f"encode or collate cannot be sent to a worker process ({error}): make it a function or class of a module, "
            "or read with workers: thread"
        ) from error


def _described(error: Exception) -> dict[str, str]:
    trace = "".join(traceback.format_exception(error))
    return {"type": type(error).__name__, "text": str(error), "traceback": trace}


def _raised(error: dict[str, str]) -> Exception:
    """The exception of a worker: a user error as itself, anything else as `WorkerFailed` with its traceback."""
    kind = getattr(errors, error["type"], None)
    if isinstance(kind, type) and issubclass(kind, MmfoundryError):
        return kind(error["text"])
    failed = WorkerFailed(f"{error['type']} in a worker process of the loader: {error['text']}")
    failed.add_note(error["traceback"])
    return failed


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"signal {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"
