"""The `filter` stage on a Ray cluster of two nodes of this machine: local processes' bytes, with a worker killed."""

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from mmfoundry.pipeline.artifact import Artifact
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.distributed import Runtime
from mmfoundry.pipeline.stage import run_stage
from mmfoundry.stages.filter import STAGE, FilterConfig
from tests.data.filters.datacomp_pool import write_pool
from tests.data.ray_cluster import Cluster, cluster, wait_for

TREE = {"all": ["basic", {"clip_score": {"top": 0.3, "model": "l14"}}]}


def run(pool: Path, output: Path, **changes: object) -> Artifact:
    tree = {"pool": str(pool), "filters": TREE, "max_unreadable": 0.5, "num_workers": 2} | changes
    return run_stage(STAGE, parse(FilterConfig, tree), output, Runtime())


def payload(artifact: Artifact) -> dict[str, bytes]:
    files = [p for p in sorted(artifact.path.rglob("*")) if p.suffix in (".parquet", ".npy", ".tar")]
    return {str(p.relative_to(artifact.path)): p.read_bytes() for p in [*files, artifact.path / "funnel.json"]}


def busy_worker(found: Cluster) -> psutil.Process | None:
    """A process of the cluster that is doing a job."""
    for node in found.nodes:
        for process in psutil.Process(node.pid).children(recursive=True):
            with suppress(psutil.Error):  # it has just ended
                if (process.cmdline() or [""])[0].startswith("ray::do"):
                    return process
    return None


@pytest.mark.slow
def test_same_bytes_as_local_though_a_worker_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed (pip install 'mmfoundry[ray]')")
    pool = tmp_path / "pool"
    write_pool(pool, 120_000, files=12)
    local = run(pool, tmp_path / "local")
    killed = []

    def kill(found: Cluster) -> None:
        wait_for(lambda: busy_worker(found) is not None, seconds=120)
        worker = busy_worker(found)
        if worker is not None:
            os.kill(worker.pid, signal.SIGKILL)
            killed.append(worker.pid)

    with cluster(nodes=2) as found:
        killer = threading.Thread(target=kill, args=(found,))
        killer.start()
        with pytest.warns(RuntimeWarning, match="its job is done again"):
            ray = run(pool, tmp_path / "ray", executor="ray", ray_address=found.address)
        killer.join()
    assert killed
    assert payload(ray) == payload(local)
    assert len(payload(ray)["subset.npy"]) > 16 * 1000
