"""The parts of a pool, done on a Ray cluster: `ray start --head` on one machine, `ray start --address=...` on others.

Every machine needs the same packages, and must see pool and output under the same paths (a shared file system): a job
writes its result to a file there, and only plain values come back. A job whose worker or machine is gone is done again
elsewhere; machines that join during a run get jobs, too.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import socket
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from mmfoundry.data.executors import MAX_DEATHS, ONE_THREAD, Executor, J, JobFailed, R, WorkerDied, died_on
from mmfoundry.pipeline.errors import ConfigError, MissingInput, MmfoundryError

# What a result may depend on. Ray itself sees to its own version and Python's.
_PACKAGES = ("mmfoundry", "numpy", "polars")
# Ray's errors that mean that a worker or a machine is gone.
_LOST = ("WorkerCrashedError", "OutOfMemoryError", "NodeDiedError", "RayActorError", "ObjectLostError")
_ANSWER_S = 5.0  # in which a cluster must take a connection; Ray itself would wait for minutes
_AHEAD = 2  # jobs that are asked for, for each core of the cluster: the next waits where the last ends


class RayExecutor(Executor):
    """Jobs as Ray tasks, each on one core; those that need GPUs are done by actors, which live on between jobs."""

    def __init__(self, num_workers: int | None, address: str | None):
        """Join a cluster.

        Args:
            num_workers: jobs at a time; None: as many as the cluster has cores.
            address: as for `executors.make_executor`.
        Raises:
            MissingInput: Ray is not installed, or no cluster answers there.
        """
        self._ray = _import_ray()
        self._limit = num_workers
        self._actors: dict[float, list[Any]] = {}  # that have no job, by their GPUs
        self._joined = not self._ray.is_initialized()
        if self._joined:
            self._join(address)

    def _join(self, address: str | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what runs here is nobody else's business
        address = address or os.environ.get("RAY_ADDRESS") or "auto"
        try:
            if ":" in address:
                place = urlsplit(address if "://" in address else f"ray://{address}")
                socket.create_connection((place.hostname or "", place.port or 10001), _ANSWER_S).close()
            self._ray.init(
                address=address,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"env_vars": ONE_THREAD},
            )
        except (OSError, ValueError, RuntimeError) as error:
            where = "on this machine" if address == "auto" else f"at {address}"
            raise MissingInput(
                f"no Ray cluster answers {where} ({str(error).splitlines()[0]}); start one with "
                "`ray start --head`, and name it by ray_address or RAY_ADDRESS"
            ) from error

    @property
    def num_workers(self) -> int:  # type: ignore[override]
        """Jobs that are done at a time, by the cluster as it is now."""
        return self._limit or max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def map(
        self, task: Callable[[J], R], jobs: Sequence[J], done: Callable[[int, R], None], *, gpus: float = 0.0
    ) -> None:
        """As `Executor.map`."""
        if gpus and self._ray.cluster_resources().get("GPU", 0) < gpus:
            gpus = 0.0
        try:
            sent = self._ray.put(task)
        except (TypeError, AttributeError) as error:
            raise ConfigError(f"{task} cannot be sent to a Ray worker: {error}") from error
        run = _Run(self, sent, jobs, gpus)
        try:
            while run.ask():
                for number, result in run.answers():
                    done(number, result)
        finally:
            run.end()

    def close(self) -> None:
        """End the actors, and leave the cluster; it goes on."""
        for actors in self._actors.values():
            for actor in actors:
                self._ray.kill(actor)
        self._actors.clear()
        if self._joined and self._ray.is_initialized():
            self._ray.shutdown()


class _Run:
    """The jobs of one `map`: which wait, and who does which."""

    def __init__(self, executor: RayExecutor, task: Any, jobs: Sequence[Any], gpus: float):
        self._executor, self._ray = executor, executor._ray
        self._task, self._jobs, self._gpus = task, jobs, gpus
        self._versions = versions()
        self._waiting = deque(range(len(jobs)))
        self._deaths: Counter[int | None] = Counter()
        self._under_way: dict[Any, int | None] = {}  # by what is awaited; None: an actor that is coming up
        self._actor_of: dict[Any, Any] = {}
        self._remote = self._ray.remote(do)
        self._lost = tuple(getattr(self._ray.exceptions, name) for name in _LOST)

    def ask(self) -> bool:
        """Hand out jobs, as many as is sensible; whether there is anything to wait for."""
        if self._gpus:
            self._ask_actors()
        else:
            most = self._executor._limit or _AHEAD * self._executor.num_workers
            options = self._remote.options(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")
            while self._waiting and len(self._under_way) < most:
                number = self._waiting.popleft()
                self._under_way[options.remote(self._task, self._jobs[number], self._versions)] = number
        return bool(self._waiting) or any(number is not None for number in self._under_way.values())

    def _ask_actors(self) -> None:
        """Jobs go to actors that are there: one that the cluster has no room for must not hold a job back."""
        idle = self._executor._actors.setdefault(self._gpus, [])
        while self._waiting and idle:
            actor = idle.pop()
            number = self._waiting.popleft()
            self._await(actor.do.remote(self._task, self._jobs[number], self._versions), actor, number)
        fit = int(self._ray.cluster_resources().get("GPU", 0) / self._gpus)
        most = min(fit, self._executor._limit or fit)
        coming = sum(number is None for number in self._under_way.values())
        while len(self._actor_of) < most and coming < len(self._waiting):
            actor = self._ray.remote(Doer).options(num_cpus=1, num_gpus=self._gpus).remote()
            self._await(actor.ready.remote(), actor, None)
            coming += 1

    def _await(self, reference: Any, actor: Any, number: int | None) -> None:
        self._under_way[reference] = number
        self._actor_of[reference] = actor

    def answers(self) -> list[tuple[int, Any]]:
        """Number and result of the jobs that have ended, after waiting for at least one or for a machine to join.

        Raises:
            MmfoundryError: as `Executor.map`.
        """
        if not self._under_way:  # no machine has a GPU at the moment
            time.sleep(1)
            return []
        ready, _ = self._ray.wait(list(self._under_way), num_returns=1, timeout=5.0)
        found = []
        for reference in ready:
            number, actor = self._under_way.pop(reference), self._actor_of.pop(reference, None)
            try:
                result = self._ray.get(reference)
            except self._lost as error:
                self._again(number, error)
                continue
            except self._ray.exceptions.RayError as error:
                if actor is not None:
                    self._executor._actors[self._gpus].append(actor)  # it is well; its job is not
                raise _raised(error) from None
            if actor is not None:
                self._executor._actors[self._gpus].append(actor)
            if number is not None:
                found.append((number, result))
        return found

    def _again(self, number: int | None, error: Exception) -> None:
        """Have a job wait again whose worker or machine is gone; None is an actor that did not come up.

        Raises:
            WorkerDied: it has ended others before.
        """
        how = type(error).__name__  # Ray's own text fills a page
        self._deaths[number] += 1
        if self._deaths[number] >= MAX_DEATHS:
            job = "an actor that had no job yet" if number is None else self._jobs[number]
            raise WorkerDied(died_on(job, how)) from error
        warnings.warn(f"a Ray worker ended ({how}); its job is done again", RuntimeWarning, stacklevel=4)
        if number is not None:
            self._waiting.append(number)

    def end(self) -> None:
        """Give up what is under way."""
        for reference in self._under_way:
            if (actor := self._actor_of.get(reference)) is not None:
                self._ray.kill(actor)
            else:
                self._ray.cancel(reference, force=True)


class Doer:
    """Lives on a GPU of the cluster; what a task loads (a model) is there for the next job."""

    def ready(self) -> None:
        """Comes back when the actor is up."""

    def do(self, task: Callable[[Any], Any], job: Any, expected: dict[str, str]) -> Any:
        """As `do`."""
        return do(task, job, expected)


def do(task: Callable[[Any], Any], job: Any, expected: dict[str, str]) -> Any:
    """Do a job on a machine of the cluster.

    Raises:
        MmfoundryError: the machine has other versions than the one that asks, so results might differ.
    """
    here = versions()
    other = [f"{name} {here[name]}, not {expected[name]}" for name in expected if here[name] != expected[name]]
    if other:
        raise MmfoundryError(
            f"the Ray machine {platform.node()} has {', '.join(other)}: install the same versions on all machines, or "
            "results would depend on where they are made"
        )
    return task(job)


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingInput("executor: ray needs the package ray; pip install 'mmfoundry[ray]'") from error
    return ray


def _raised(error: Any) -> Exception:
    """What a task raised: a user error as itself, anything else with its traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, MmfoundryError):
        return cause
    trace = re.sub("\x1b\\[[0-9;]*m", "", str(error))  # without colours
    failed = JobFailed(f"{type(cause).__name__}: {cause}" if cause else trace.strip().splitlines()[-1])
    failed.add_note(trace)
    return failed
