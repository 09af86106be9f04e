"""Ray does what local processes do, on two nodes of this machine, while workers and nodes are lost.

Starting two nodes takes a quarter of a minute, so all but the first tests are slow ones.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from mmfoundry.data.executors import Executor, JobFailed, LocalExecutor, WorkerDied, make_executor
from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput, MmfoundryError
from tests.data import executor_tasks as tasks
from tests.data.ray_cluster import Cluster, cluster, free_port, lose, wait_for
from tests.data.test_executors import results


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingInput, match=r"pip install 'mmfoundry\[ray\]'"):
        make_executor("ray", None)


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    pytest.importorskip("ray", reason="ray is not installed (pip install 'mmfoundry[ray]')")
    with cluster(nodes=2, gpus=1) as found:
        yield found


@pytest.fixture(scope="module")
def ray_executor(two_nodes: Cluster) -> Iterator[Executor]:
    with make_executor("ray", None, two_nodes.address) as executor:
        wait_for(lambda: executor.num_workers == 2)
        yield executor


@pytest.mark.slow
@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "127.0.0.1:{}0", "nothing"])
def test_no_cluster(form: str) -> None:
    pytest.importorskip("ray", reason="ray is not installed (pip install 'mmfoundry[ray]')")
    address = form.format(free_port())
    with pytest.raises(MissingInput, match=rf"no Ray cluster answers at {address} .*ray start --head"):
        make_executor("ray", None, address)


@pytest.mark.slow
def test_same_bytes_as_local_though_a_worker_is_killed(ray_executor: Executor, tmp_path: Path) -> None:
    with LocalExecutor(2) as local:
        expected = results(local, tasks.writes_table, [(tmp_path / "local", number, None) for number in range(12)])
    trace = tmp_path / "trace"

    def kill() -> None:
        wait_for(lambda: trace.exists() and trace.read_text() != "")
        os.kill(int(trace.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    jobs = [(tmp_path / "ray", number, trace if number == 5 else None) for number in range(12)]
    with pytest.warns(RuntimeWarning, match="its job is done again"):
        found = results(ray_executor, tasks.writes_table, jobs)
    killer.join()
    assert found == expected
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert len(contents(tmp_path / "ray")) == 12


@pytest.mark.slow
def test_work_is_spread_in_processes_of_one_thread(ray_executor: Executor) -> None:
    found = list(results(ray_executor, tasks.told, list(range(12))).values())
    assert len({process for process, *_ in found}) >= 2
    assert {threads for *_, threads in found} == {1}
    assert {told["OMP_NUM_THREADS"] for _, _, told, _ in found} == {"1"}


@pytest.mark.slow
def test_errors_are_as_local_ones(ray_executor: Executor) -> None:
    with pytest.raises(DamagedInput, match=r"^part 2: cut off$"):
        results(ray_executor, tasks.damaged, [0, 1, 2, 3])
    for task, text in ((tasks.bug, "ZeroDivisionError: "), (tasks.two_parts, "one and two")):
        with pytest.raises(JobFailed, match=text) as caught:
            results(ray_executor, task, [1])
        assert "executor_tasks.py" in caught.value.__notes__[0]
        assert "\x1b" not in caught.value.__notes__[0]
    with (
        pytest.warns(RuntimeWarning, match="its job is done again"),
        pytest.raises(WorkerDied, match=r"^pool-00001.tar: 3 workers ended on it, the last with WorkerCrashedError"),
    ):
        results(ray_executor, tasks.dies, ["pool-00001.tar"])
    lock = threading.Lock()
    with pytest.raises(ConfigError, match="cannot be sent to a Ray worker"):
        results(ray_executor, partial(max, lock), [1])
    assert results(ray_executor, tasks.square, [4]) == {0: 16}


@pytest.mark.slow
def test_an_error_where_a_job_is_reported_stops_the_rest(ray_executor: Executor, tmp_path: Path) -> None:
    def stop(number: int, result: int) -> None:
        raise MmfoundryError("too many")

    with pytest.raises(MmfoundryError, match="too many"):
        ray_executor.map(tasks.waits_after_first, [(tmp_path, 0), (tmp_path, 1)], stop)
    assert results(ray_executor, tasks.square, list(range(4))) == {number: number**2 for number in range(4)}


@pytest.mark.slow
def test_jobs_with_gpus_are_done_by_actors_that_live_on(ray_executor: Executor, tmp_path: Path) -> None:
    first, second = (list(results(ray_executor, tasks.told, list(range(6)), gpus=1).values()) for _ in range(2))
    processes = {process for process, *_ in first}
    assert processes == {process for process, *_ in second}
    assert len(processes) == 2  # one a GPU
    assert max(count for _, count, *_ in second) > max(count for _, count, *_ in first)
    assert {told["CUDA_VISIBLE_DEVICES"] for _, _, told, _ in first} == {"0"}
    with pytest.warns(RuntimeWarning, match="its job is done again"):
        found = results(ray_executor, tasks.dies_once, [(tmp_path, number) for number in range(8)], gpus=1)
    assert found == {number: number for number in range(8)}
    with pytest.raises(DamagedInput, match="part 2"):
        results(ray_executor, tasks.damaged, [0, 1, 2, 3], gpus=1)
    # more than the cluster has: as without
    assert results(ray_executor, tasks.square, [1, 2], gpus=8) == {0: 1, 1: 4}


@pytest.mark.slow
def test_other_versions_on_a_machine_are_refused(ray_executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmfoundry.data import executors_ray

    there = executors_ray.versions()
    monkeypatch.setattr(executors_ray, "versions", lambda: there | {"polars": "0.1"})
    with pytest.raises(MmfoundryError, match=rf"has polars {there['polars']}, not 0\.1: install the same versions"):
        results(ray_executor, tasks.square, [1])


@pytest.mark.slow
def test_a_node_is_lost(two_nodes: Cluster, ray_executor: Executor, tmp_path: Path) -> None:
    """Comes last: the other node does the rest."""
    traces = [tmp_path / "4", tmp_path / "5"]

    def lose_one() -> None:
        wait_for(lambda: all(trace.exists() for trace in traces))  # each node is in the middle of one
        lose(two_nodes.nodes[1])
        for trace in traces:
            trace.with_suffix(".go").touch()

    loser = threading.Thread(target=lose_one)
    loser.start()
    jobs = [(tmp_path / "ray", number, tmp_path / str(number) if number in (4, 5) else None) for number in range(12)]
    with pytest.warns(RuntimeWarning, match="its job is done again"):
        found = results(ray_executor, tasks.writes_table, jobs)
    loser.join()
    assert sorted(found) == list(range(12))
    assert len(contents(tmp_path / "ray")) == 12


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}
