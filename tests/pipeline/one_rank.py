"""One rank of a tiny training, as `start_ranks` starts it: module and arguments OUTPUT CONFIG [WHAT STEP RANK].

WHAT happens to RANK (-1: to all) after STEP: a signal by name, or `hang` (its loader never comes back) or `raise`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmfoundry.launch.failures import exit_code_of, leave
from mmfoundry.pipeline.distributed import init_runtime
from mmfoundry.pipeline.ranks import end_with_starter
from mmfoundry.pipeline.stage import run_stage
from tests.pipeline import tiny_training
from tests.pipeline.tiny_training import TINY, TinyConfig, TinyLoader


class SeenLoader(TinyLoader):
    """Notes which rows this rank was given in which step, and may stop at one."""

    seen: Path
    trouble: tuple[str, int] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in super().__iter__():
            step = self.consumed // self.batch_size
            if self.trouble == ("hang", step):
                time.sleep(900)
            if self.trouble == ("raise", step):
                raise ValueError("this rank's disk is gone")
            with self.seen.open("a") as file:
                file.write(json.dumps([step, batch["__key__"]]) + "\n")
            yield batch


def main(output: str, config: str, what: str = "", step: str = "0", rank: str = "0") -> None:
    end_with_starter()
    runtime = init_runtime()
    SeenLoader.seen = Path(output).with_name(f"seen-{runtime.rank}-of-{runtime.world_size}.jsonl")
    if what and int(rank) in (runtime.rank, -1):
        SeenLoader.trouble = (what, int(step))
        if what.startswith("SIG"):
            tiny_training.SIGNAL_AFTER = (what, int(step))
    tiny_training.TinyLoader = SeenLoader  # type: ignore[misc]
    run_stage(TINY, TinyConfig.model_validate(json.loads(config)), Path(output), runtime)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    leave(exit_code_of(lambda: main(*sys.argv[1:])))
