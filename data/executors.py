"""Who does the work on the parts of a pool: this process, processes of this machine, or a Ray cluster.

A job is a whole part (a shard, a metadata file): its result goes to a file, written whole, and only a few plain values
come back. So a job may be done twice, on any machine, and a job that was cut off is done again from its start. Worker
processes are started afresh (spawn: polars' threads do not survive a fork) and live as long as the executor, so what
they loaded (a model, a word list) is there for the next jobs.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context, reduction, util
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from mmfoundry.pipeline.errors import ConfigError, MmfoundryError

J = TypeVar("J")
R = TypeVar("R")

MAX_DEATHS = 3  # workers that one job may end
# What keeps a worker's libraries to one thread each: the cores are shared out by workers.
ONE_THREAD = {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_END_S = 0.2  # seconds that idle workers get to end by themselves


class WorkerDied(MmfoundryError):
    """A worker ended before its job was done, and giving the job to others did not help."""


class JobFailed(RuntimeError):
    """An exception in a worker that is no user error; its traceback is in the notes."""


class Executor(ABC):
    """Does jobs, some at a time; `close` it, or use it in `with`.

    Attributes:
        num_workers: jobs that are done at a time.
    """

    num_workers: int

    @abstractmethod
    def map(
        self, task: Callable[[J], R], jobs: Sequence[J], done: Callable[[int, R], None], *, gpus: float = 0.0
    ) -> None:
        """Do all jobs, in any order.

        Args:
            task: what to do: a function of a module, or a `functools.partial` of one. It may be called twice with one
                job, so it must leave the same behind.
            jobs: what to do it with; a job that has a `name` is called by it in errors.
            done: called in this process with number and result of each job as it ends; what it raises stops the rest.
            gpus: that one job needs; each has its own, or its share where the number is below 1. Without GPUs on the
                machine it changes nothing.
        Raises:
            MmfoundryError: as the first task to fail raised it; jobs that are under way are given up.
            WorkerDied: a job ended `MAX_DEATHS` workers; names the job.
            JobFailed: a task raised anything else.
        """

    def dismiss(self) -> None:  # noqa: B027 (not all have workers)
        """Let workers go, since no job will come for long: they end while this process does something else."""

    def close(self) -> None:  # noqa: B027 (not all have workers)
        """End the workers, and wait for that."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_executor(kind: Literal["local", "ray"], num_workers: int | None, address: str | None = None) -> Executor:
    """The executor of this kind.

    Args:
        kind: "local" is this machine (this process alone for one worker), "ray" a Ray cluster.
        num_workers: jobs at a time; None: one a core, of this machine or of the cluster as it is at each moment.
        address: of the cluster (`host:port`, or `ray://host:port`); None: the one that runs on this machine, or that
            `RAY_ADDRESS` names.
    Raises:
        MissingInput: Ray is not installed, or there is no cluster.
    """
    if kind == "ray":
        from mmfoundry.data.executors_ray import RayExecutor

        return RayExecutor(num_workers, address)
    num_workers = num_workers or len(os.sched_getaffinity(0))
    return LocalExecutor(num_workers) if num_workers > 1 else SerialExecutor()


class SerialExecutor(Executor):
    """This process, one job after the other, with all threads."""

    num_workers = 1

    def map(
        self, task: Callable[[J], R], jobs: Sequence[J], done: Callable[[int, R], None], *, gpus: float = 0.0
    ) -> None:
        """As `Executor.map`; jobs come in order, and any exception of a task comes as itself."""
        for number, job in enumerate(jobs):
            done(number, task(job))


class LocalExecutor(Executor):
    """Processes of this machine, each with one thread."""

    def __init__(self, num_workers: int):
        self.num_workers = num_workers
        self._teams: dict[float, list[_Worker]] = {}  # by the GPUs that each of their workers has
        # before multiprocessing's own end of its children, which would wait for jobs that nobody needs
        self._leaving: list[_Worker] = []
        self._at_exit = util.Finalize(self, _end_all, args=(self._teams, self._leaving), exitpriority=100)

    def map(
        self, task: Callable[[J], R], jobs: Sequence[J], done: Callable[[int, R], None], *, gpus: float = 0.0
    ) -> None:
        """As `Executor.map`. A worker that dies is replaced, and its job done again after all others."""
        if not self._at_exit.still_active():
            raise ValueError("the executor is closed")
        visible = _visible_gpus() if gpus else []
        team = self._team(gpus if visible else 0.0, visible, len(jobs))
        waiting = deque(range(len(jobs)))
        deaths: Counter[int] = Counter()
        told: set[_Worker] = set()  # who know the task
        try:
            for worker in team:
                self._next(worker, task, jobs, waiting, told)
            while busy := {worker.connection: worker for worker in team if worker.job is not None}:
                for ready in connection.wait(list(busy)):
                    worker = busy[ready]  # type: ignore[index]
                    number = worker.job
                    try:
                        kind, value = worker.receive()
                    except (EOFError, OSError):
                        team[team.index(worker)] = self._replaced(worker, jobs, waiting, deaths)
                        continue
                    if kind == "failed":
                        raise _raised(value)
                    if kind == "done" and number is not None:
                        worker.job = None
                        done(number, value)
                for worker in team:
                    if worker.job is None:
                        self._next(worker, task, jobs, waiting, told)
        finally:
            for worker in [worker for worker in team if worker.job is not None]:
                worker.end()  # it is dead, or in the middle of a job that nobody waits for any more
                team.remove(worker)

    def _team(self, gpus: float, visible: list[str], jobs: int) -> list[_Worker]:
        """The workers with this many GPUs each; as many as there are jobs, and GPUs, for."""
        most = min(self.num_workers, int(len(visible) / gpus) or 1) if gpus else self.num_workers
        team = self._teams.setdefault(gpus, [])
        while len(team) < min(most, jobs):
            first = int(len(team) * gpus)
            mine = {"CUDA_VISIBLE_DEVICES": ",".join(visible[first : first + max(1, int(gpus))])} if gpus else {}
            team.append(_Worker(ONE_THREAD | mine))
        return team

    def _next(
        self, worker: _Worker, task: Callable[[J], R], jobs: Sequence[J], waiting: deque[int], told: set[_Worker]
    ) -> None:
        """Give a worker the next job that waits, if any."""
        if not waiting:
            return
        worker.job = waiting.popleft()
        worker.send(None if worker in told else task, jobs[worker.job])
        told.add(worker)

    def _replaced(self, worker: _Worker, jobs: Sequence[J], waiting: deque[int], deaths: Counter[int]) -> _Worker:
        """Another worker in the place of one that died; its job waits again, behind all others.

        Raises:
            WorkerDied: it never came up, or its job has ended others before.
        """
        number, how = worker.job, worker.bury()
        assert number is not None  # only who has a job is listened to
        if not worker.came_up and not how.startswith("signal"):
            raise WorkerDied(
                f"a worker process ended with {how} before its first job; its traceback is above. A script that starts "
                "worker processes needs its code under `if __name__ == '__main__':`"
            )
        deaths[number] += 1
        if deaths[number] >= MAX_DEATHS:
            raise WorkerDied(died_on(jobs[number], how))
        warnings.warn(f"a worker process ended with {how}; its job is done again", RuntimeWarning, stacklevel=3)
        waiting.append(number)
        return _Worker(worker.environment)

    def dismiss(self) -> None:
        """As `Executor.dismiss`; jobs that come all the same get other workers."""
        for team in self._teams.values():
            self._leaving += team
            team.clear()
        for worker in self._leaving:
            worker.connection.close()  # the end of its input

    def close(self) -> None:
        """As `Executor.close`."""
        self._at_exit()


class _Worker:
    """One worker process, seen from the process that started it."""

    def __init__(self, environment: dict[str, str]):
        context = get_context("spawn")
        self.environment = environment
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs,), name="executor", daemon=True)
        with _environment(environment):  # before the child imports anything
            self._process.start()
        theirs.close()  # else the end of the worker would not be the end of its messages
        self.job: int | None = None
        self.came_up = False

    def send(self, task: Callable[[Any], Any] | None, job: object) -> None:
        """Have a job done; the task is the one before where it is None.

        Raises:
            ConfigError: task or job cannot be sent.
        """
        try:
            message = reduction.ForkingPickler.dumps((task, job))
        except (reduction.pickle.PicklingError, AttributeError, TypeError) as error:  # type: ignore[attr-defined]
            self.job = None
            raise ConfigError(f"{task or job} cannot be sent to a worker process: {error}") from error
        with suppress(OSError):  # it died; that is seen when its answer is read
            self.connection.send_bytes(message)

    def receive(self) -> tuple[str, Any]:
        """The next message: kind, and what comes with it."""
        kind, value = self.connection.recv()
        self.came_up = True
        return kind, value

    def bury(self) -> str:
        """After its death: how it ended."""
        self._process.join()
        self.connection.close()
        code = self._process.exitcode
        return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"

    def end(self, wait_s: float = 0.0) -> None:
        """End it, whatever it is doing."""
        self.connection.close()  # the end of its input: who waits for work ends by itself
        self._process.join(wait_s)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


def work(pipe: Connection) -> None:
    """The life of a worker process: do what is asked for until the other end is closed.

    Interrupts from a terminal go to every process of it; here they are for the process that gave the job to act on.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    task: Callable[[Any], Any] | None = None
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send(("ready", None))
        while True:
            message = pipe.recv_bytes()
            try:
                new, job = reduction.ForkingPickler.loads(message)
                task = new or task
                assert task is not None  # it comes with the first job
                answer = reduction.ForkingPickler.dumps(("done", task(job)))
            except Exception as error:
                pipe.send(("failed", _described(error)))
                raise SystemExit(1) from error  # quietly: who gave the job shows it
            pipe.send_bytes(answer)
    # All answers are given, and to take interpreter and libraries apart in good order takes half a second.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def died_on(job: object, how: str) -> str:
    """What to say of a job that nobody could finish."""
    return (
        f"{name_of_job(job)}: {MAX_DEATHS} workers ended on it, the last with {how}; what is finished is kept. If "
        "memory ran out, run again with fewer num_workers, otherwise look at this part"
    )


def name_of_job(job: object) -> str:
    """What to call a job in an error."""
    text = str(getattr(job, "name", None) or job)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _described(error: Exception) -> tuple[Exception | None, str, str]:
    """A user error as itself, and the text and traceback of any other."""
    itself = error if isinstance(error, MmfoundryError) and _can_be_sent(error) else None
    return itself, f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))


def _can_be_sent(error: MmfoundryError) -> bool:
    try:
        reduction.ForkingPickler.loads(reduction.ForkingPickler.dumps(error))
    except (reduction.pickle.PicklingError, AttributeError, TypeError):  # type: ignore[attr-defined]
        return False
    return True


def _raised(described: tuple[Exception | None, str, str]) -> Exception:
    itself, text, trace = described
    if itself is not None:
        return itself
    failed = JobFailed(text)
    failed.add_note(trace)
    return failed


def _end_all(teams: dict[float, list[_Worker]], leaving: list[_Worker]) -> None:
    workers = [*leaving, *(worker for team in teams.values() for worker in team)]
    for worker in workers:
        worker.connection.close()
    for worker in workers:
        worker.end(_END_S)
    teams.clear()
    leaving.clear()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for what is started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _visible_gpus() -> list[str]:
    """What names each GPU that this process may use."""
    import torch

    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = said.split(",") if said else [str(number) for number in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]
