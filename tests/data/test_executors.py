"""Executors do every job once or more, name what failed, and leave no process behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from mmfoundry.data.executors import (
    Executor,
    JobFailed,
    LocalExecutor,
    SerialExecutor,
    WorkerDied,
    make_executor,
    name_of_job,
)
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MmfoundryError
from tests.data import executor_tasks as tasks


@pytest.fixture(scope="module")
def two() -> Iterator[Executor]:
    with LocalExecutor(2) as executor:
        yield executor


def results(executor: Executor, task: Callable[[Any], Any], jobs: list[Any], **more: Any) -> dict[int, Any]:
    found: dict[int, Any] = {}

    def done(number: int, result: Any) -> None:
        assert number not in found, "a job was reported twice"
        found[number] = result

    executor.map(task, jobs, done, **more)
    return found


def test_every_job_is_done(two: Executor) -> None:
    expected = {number: number * number for number in range(20)}
    assert results(two, tasks.square, list(range(20))) == expected
    assert results(SerialExecutor(), tasks.square, list(range(20))) == expected
    assert results(two, tasks.square, []) == {}
    assert results(two, partial(pow, 2), [1, 2]) == {0: 2, 1: 4}  # another task for the same workers


def test_the_kind_follows_from_the_number_of_workers() -> None:
    assert isinstance(make_executor("local", 1), SerialExecutor)
    with make_executor("local", 3) as executor:
        assert isinstance(executor, LocalExecutor)
        assert executor.num_workers == 3


def test_workers_have_one_thread_and_live_on(two: Executor) -> None:
    first, second = (list(results(two, tasks.told, list(range(4))).values()) for _ in range(2))
    assert {process for process, *_ in first} == {process for process, *_ in second}
    assert os.getpid() not in {process for process, *_ in first}
    assert max(count for _, count, *_ in second) > max(count for _, count, *_ in first)
    assert {threads for *_, threads in first} == {1}
    assert {told["OMP_NUM_THREADS"] for _, _, told, _ in first} == {"1"}
    assert "POLARS_MAX_THREADS" not in os.environ  # only in the workers


def test_the_job_of_a_killed_worker_is_done_again(two: Executor, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="SIGKILL"):
        found = results(two, tasks.dies_once, [(tmp_path, number) for number in range(8)])
    assert found == {number: number for number in range(8)}
    assert (tmp_path / "died").exists()
    assert results(two, tasks.square, [1, 2, 3]) == {0: 1, 1: 4, 2: 9}


@pytest.mark.parametrize(("task", "how"), [(tasks.dies, "signal SIGKILL"), (tasks.leaves, "exit code 7")])
def test_a_job_that_ends_every_worker_is_named(two: Executor, task: Callable[[Any], Any], how: str) -> None:
    with (
        pytest.warns(RuntimeWarning, match=how),
        pytest.raises(WorkerDied, match=rf"^pool-00001.tar: 3 workers ended on it, the last with {how}"),
    ):
        results(two, task, ["pool-00001.tar"])
    assert results(two, tasks.square, [4]) == {0: 16}


def test_user_errors_come_as_themselves(two: Executor) -> None:
    for executor in (two, SerialExecutor()):
        with pytest.raises(DamagedInput, match=r"^part 2: cut off$"):
            results(executor, tasks.damaged, [0, 1, 2, 3])
    assert results(two, tasks.square, [4]) == {0: 16}


@pytest.mark.parametrize(("task", "text"), [(tasks.bug, "ZeroDivisionError: "), (tasks.two_parts, "one and two")])
def test_other_errors_bring_their_traceback(two: Executor, task: Callable[[int], int], text: str) -> None:
    with pytest.raises(JobFailed, match=text) as caught:
        results(two, task, [1])
    assert "executor_tasks.py" in caught.value.__notes__[0]


def test_what_cannot_be_sent_is_said(two: Executor) -> None:
    with pytest.raises(ConfigError, match="cannot be sent to a worker"):
        results(two, lambda job: job, [1])
    assert results(two, tasks.square, [4]) == {0: 16}


def test_an_error_where_a_job_is_reported_stops_the_rest(tmp_path: Path) -> None:
    def stop(number: int, result: int) -> None:
        raise MmfoundryError("too many")

    with LocalExecutor(2) as executor:
        with pytest.raises(MmfoundryError, match="too many"):
            executor.map(tasks.waits_after_first, [(tmp_path, 0), (tmp_path, 1)], stop)
        (begun,) = tmp_path.iterdir()
        assert not alive(int(begun.name))
        assert results(executor, tasks.square, [1, 2]) == {0: 1, 1: 4}


def test_no_process_is_left_behind() -> None:
    with LocalExecutor(2) as executor:
        processes = {process for process, *_ in results(executor, tasks.told, list(range(4))).values()}
    assert processes
    assert not any(alive(process) for process in processes)
    with pytest.raises(ValueError, match="closed"):
        results(executor, tasks.square, [1])


def test_dismissed_workers_end_and_others_come_for_further_jobs() -> None:
    with LocalExecutor(2) as executor:
        first = {process for process, *_ in results(executor, tasks.told, list(range(4))).values()}
        executor.dismiss()
        deadline = time.monotonic() + 20
        while any(alive(process) for process in first) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert first
        assert not any(alive(process) for process in first)
        later = {process for process, *_ in results(executor, tasks.told, list(range(4))).values()}
        assert later
        assert not later & first
        executor.dismiss()
    assert not any(alive(process) for process in later)


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import sys
            from pathlib import Path
            from mmfoundry.data.executors import LocalExecutor
            from tests.data.executor_tasks import told

            if __name__ == "__main__":
                def show(number, result):
                    print(result[0], flush=True)
                executor = LocalExecutor(2)
                executor.map(told, [0, 1, 2, 3], show)
                print("idle", flush=True)
                sys.stdin.read()
        """)
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    workers = {int(line) for line in iter(process.stdout.readline, "idle\n")}
    assert all(alive(worker) for worker in workers)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 20
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(worker) for worker in workers)


def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from mmfoundry.data.executors import LocalExecutor\nLocalExecutor(2).map(abs, [1], print)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "if __name__ == '__main__':" in done.stderr.strip().splitlines()[-1]


def test_each_worker_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfoundry.data.executors._visible_gpus", lambda: ["4", "6", "7"])

    def devices(gpus: float) -> set[str | None]:
        with LocalExecutor(2) as executor:
            found = results(executor, tasks.told, list(range(4)), gpus=gpus).values()
        return {told["CUDA_VISIBLE_DEVICES"] for _, _, told, _ in found}

    assert devices(1) == {"4", "6"}
    assert devices(0.5) == {"4"}
    assert devices(3) == {"4,6,7"}


def test_jobs_are_named() -> None:
    class Part:
        name = "shard-7.tar"

    assert name_of_job(Part()) == "shard-7.tar"
    assert name_of_job(Path("a/b.parquet")) == "b.parquet"
    assert name_of_job("x" * 300) == "x" * 200 + "..."


def alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
