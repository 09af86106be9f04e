"""torchrun that ends as its ranks do: `python launch/torchrun.py [torchrun's options] launch/pretrain.py CONFIG ...`.

torchrun itself ends with 1 whatever its ranks end with, and SIGUSR1, by which Slurm announces the end, kills it beside
its ranks. Here SIGTERM and SIGUSR1 go to the ranks alone, which save and end with 85, and that is the exit code. It is
85, too, when the signal comes before the ranks listen for it: nothing is lost, and the run is to be started again.
Also `python -m mmfoundry.launch.torchrun [torchrun's options] -m mmfoundry.launch.pretrain CONFIG ...`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from mmfoundry.pipeline.errors import PREEMPTED_EXIT_CODE
from mmfoundry.pipeline.signals import STOPPING

# What torchrun hands to its ranks by itself, less SIGTERM: it would end them after 30 s, saved or not.
_TORCHRUNS = "SIGINT,SIGHUP,SIGQUIT"


def main(arguments: Sequence[str] | None = None) -> int:
    """Start this host's ranks and wait for them.

    Args:
        arguments: torchrun's own; `sys.argv` when None.
    Returns:
        0; the exit code of the rank that failed first, 1 for one that a signal ended; or 85.
    Raises:
        SystemExit: code 85: told to stop before there were ranks.
    """
    told: set[int] = set()

    def pass_on(number: int, frame: FrameType | None) -> None:
        told.add(number)
        if not _send_to_children(number):
            raise SystemExit(PREEMPTED_EXIT_CODE)

    for number in STOPPING:
        signal.signal(number, pass_on)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        run.main([f"--signals-to-handle={_TORCHRUNS}", *given])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        print(f"a rank ended with exit code {code}", file=sys.stderr, flush=True)
        return PREEMPTED_EXIT_CODE if -code in told else max(code, 1)
    return 0


def _send_to_children(number: int) -> int:
    """Signal the processes that this one started; how many there were."""
    import psutil

    children = psutil.Process().children()
    for child in children:
        try:
            child.send_signal(number)
        except psutil.NoSuchProcess:
            continue
    return len(children)


if __name__ == "__main__":
    here = os.path.realpath(os.path.dirname(__file__))
    sys.path[:] = [path for path in sys.path if os.path.realpath(path or ".") != here]  # `eval` there is ours
    sys.exit(main())
