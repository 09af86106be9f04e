"""The body of the launcher scripts: one rank of one stage, started by deepspeed, torchrun, srun or plain python."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mmfoundry.launch.failures import USER_ERROR, exit_code_of, leave
from mmfoundry.pipeline.errors import MmfoundryError
from mmfoundry.pipeline.ranks import ERROR_FILE, end_with_starter

DRY_RUN = "--dry-run"
_LET_RANK_0_SPEAK_S = 5.0


def main(stage: str, arguments: Sequence[str] | None = None) -> None:
    """Run one rank of `stage` and exit; `mmfoundry <stage>` does the same on one process.

    Args:
        stage: the stage's name.
        arguments: `CONFIG [key=value ...] [--dry-run]`; `--local_rank N`, which launchers add, is accepted. `sys.argv`
            when None.
    """
    here = os.path.realpath(os.path.dirname(__file__))
    # A script's own folder leads the import path; ours has names (`eval`, `filter`) that no other package should find.
    sys.path[:] = [path for path in sys.path if os.path.realpath(path or ".") != here]
    rest, local_rank = take_local_rank(list(sys.argv[1:] if arguments is None else arguments))
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", local_rank)
    dry_run = DRY_RUN in rest
    rest = [argument for argument in rest if argument != DRY_RUN]
    if not rest or rest[0].startswith("-"):
        print(__doc__ if rest else "", f"usage: launch/{stage}.py CONFIG [key=value ...] [--dry-run]", file=sys.stderr)
        sys.exit(0 if rest and rest[0] in ("-h", "--help") else USER_ERROR)
    end_with_starter()
    work = _describe if dry_run else _run
    leave(exit_code_of(lambda: work(stage, Path(rest[0]), rest[1:])))


def take_local_rank(arguments: list[str]) -> tuple[list[str], str | None]:
    """Split what a launcher adds (`--local_rank=0`, `--local-rank 0`) from the user's arguments."""
    rest: list[str] = []
    local_rank = None
    waiting = iter(arguments)
    for argument in waiting:
        flag, equals, value = argument.partition("=")
        if flag in ("--local_rank", "--local-rank"):
            local_rank = value if equals else next(waiting, None)
        else:
            rest.append(argument)
    return rest, local_rank


def _describe(stage: str, config: Path, arguments: list[str]) -> None:
    """Say on rank 0 what would be run, as `mmfoundry STAGE --dry-run` does; the others end at once."""
    if os.environ.get("RANK", "0") != "0":
        return
    from mmfoundry.launch import verbs
    from mmfoundry.launch.catalog import Stages

    print(verbs.describe(verbs.prepare(Stages(), stage, config, arguments)), flush=True)


def _run(stage: str, config: Path, arguments: list[str]) -> None:
    # Imported here, so that a wrong command line is refused before torch has been loaded.
    from mmfoundry.launch import verbs
    from mmfoundry.launch.catalog import Stages

    try:
        job = verbs.prepare(Stages(), stage, config, arguments)
    except MmfoundryError:
        if os.environ.get("RANK", "0") == "0":
            raise
        time.sleep(_LET_RANK_0_SPEAK_S)  # it fails alike; ending first would have the launcher kill it unheard
        sys.exit(USER_ERROR)
    from mmfoundry.pipeline.distributed import init_runtime

    share_cores()
    runtime = init_runtime()
    artifact = verbs.execute(job, runtime)
    if runtime.is_main and ERROR_FILE not in os.environ:  # else a recipe started us, and says it in its own way
        print(verbs.outcome(artifact), flush=True)


def share_cores() -> None:
    """Give each rank of this machine its part of the cores, unless the launcher or user set `OMP_NUM_THREADS`."""
    import torch

    ranks = int(
        next((os.environ[name] for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE") if name in os.environ), 1)
    )
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
