"""Our side: the `filter` stage, as `mmfoundry filter` runs it.

    python stage.py CONFIG.yaml OUTPUT WORKERS

The clock starts once worker processes are up and modules are imported, as on the peer's side; models are loaded within
it. Ends with one line of JSON: rows and seconds.
"""

import json
import sys
import time
from pathlib import Path

import numpy.ma  # polars looks at it when it is given an array

from mmfoundry.data.derived.base import DERIVATIONS
from mmfoundry.data.executors import make_executor
from mmfoundry.data.filters.base import FILTERS
from mmfoundry.launch import verbs
from mmfoundry.launch.catalog import Stages
from mmfoundry.pipeline import metrics
from mmfoundry.pipeline.distributed import init_runtime
from mmfoundry.stages import filter_passes


def imported(_: int) -> list[str]:
    """Have all modules of filters in this process; a registry imports its own when it is asked."""
    return [numpy.ma.__name__, metrics.__name__, *FILTERS, *DERIVATIONS]


def main(config: str, output: str, workers: str) -> None:
    """Run the stage."""
    executor = make_executor("local", int(workers))
    executor.map(imported, range(int(workers) * 2), lambda *_: None)
    filter_passes.make_executor = lambda *_: executor
    job = verbs.prepare(Stages(), "filter", Path(config), [f"output={output}", f"num_workers={workers}"])
    runtime = init_runtime()
    start = time.perf_counter()
    artifact = verbs.execute(job, runtime)
    seconds = time.perf_counter() - start
    print(json.dumps({"rows": artifact.manifest.metrics["samples"], "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
