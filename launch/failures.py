"""How a command ends when it fails: a user error is one `error:` line and exit code 2, a bug keeps its traceback."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from mmfoundry.pipeline.errors import PREEMPTED_EXIT_CODE, MmfoundryError, disk_full
from mmfoundry.pipeline.ranks import leave_error
from mmfoundry.pipeline.signals import STOPPING, listening

USER_ERROR = 2
INTERRUPTED = 130


class _ToldToStop(BaseException):
    """A signal asked for the end while nothing listened that would save more than is on the disk already."""


def exit_code_of(work: Callable[[], None]) -> int:
    """Do `work` and return the exit code, having told the user what went wrong, if anything did.

    In a rank started by `mmfoundry run --processes`, the line goes to the starter, which prints it once.
    """
    try:
        with _stopping_in_order():
            work()
        sys.stdout.flush()  # here, where a full disk or a closed pipe is still answered
    except MmfoundryError as error:
        return tell(str(error))
    except SystemExit as stop:  # a training that saved its state because it was told to stop
        if not isinstance(stop.code, int):
            raise
        return stop.code
    except KeyboardInterrupt:
        tell("interrupted; run the same command again to go on")
        return INTERRUPTED
    except _ToldToStop:
        tell("told to stop; run the same command again to go on")
        return PREEMPTED_EXIT_CODE
    except BrokenPipeError:
        _drop_output()
        return 0  # the reader, such as `head`, has seen enough
    except Exception as error:
        text = system_error(error)
        if text is None:
            raise
        _drop_output()
        return tell(text)
    return 0


@contextmanager
def _stopping_in_order() -> Iterator[None]:
    """End at SIGTERM and SIGUSR1 as at Ctrl-C, through every `finally`; a training listens to them by itself.

    The second signal ends the process at once. One of several ranks is left to its starter, which knows what a rank
    means that a signal ended: in a collective it would not hear of the signal before the others come.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for each in STOPPING:
            signal.signal(each, signal.SIG_DFL)
        raise _ToldToStop

    with listening(stop):
        yield


def _drop_output() -> None:
    """Send what standard output still holds nowhere, lest Python fail on it again while it ends."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def leave(code: int) -> NoReturn:
    """End the process with this exit code, having left the other ranks in order.

    gloo's threads abort a process that ends beside them. After a failure the other ranks may be gone already, and
    saying goodbye to them may take for ever: then everything is flushed and the process ends at once.
    """
    distributed = sys.modules.get("torch.distributed")
    joined = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if distributed is not None and joined and code == 0:
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    if joined and code != 0:
        os._exit(code)
    sys.exit(code)


def system_error(error: Exception) -> str | None:
    """One line for what the machine, not our code, is to blame for; None for anything else."""
    if disk_full(error):
        name = getattr(error, "filename", None)
        return f"no space left on the disk{f' of {name}' if name else ''}; free some and run the same command again"
    if (
        isinstance(
            error, FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError | NotADirectoryError
        )
        and error.filename
    ):
        return f"{error.filename}: {(error.strerror or 'cannot be read').lower()}"
    return None


def tell(text: str) -> int:
    """Print an error line, or leave it for the process that started this rank; returns the exit code."""
    leave_error(text)
    return USER_ERROR
