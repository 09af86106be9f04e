"""How a command ends when it fails: a user error is one `error:` line and exit code 2, a bug keeps its traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from mmfoundry.pipeline.errors import MmfoundryError
from mmfoundry.pipeline.ranks import ERROR_FILE

USER_ERROR = 2
INTERRUPTED = 130


def exit_code_of(work: Callable[[], None]) -> int:
    """Do `work` and return the exit code, having told the user what went wrong, if anything did.

    In a rank started by `mmfoundry run --processes`, the line goes to the starter, which prints it once.
    """
    try:
        work()
    except MmfoundryError as error:
        return tell(str(error))
    except KeyboardInterrupt:
        tell("interrupted; run the same command again to go on")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output, such as `head`, has seen enough. Python would complain again while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        text = system_error(error)
        if text is None:
            raise
        return tell(text)
    return 0


def system_error(error: Exception) -> str | None:
    """One line for what the machine, not our code, is to blame for; None for anything else."""
    # Imported here: it brings numpy, and most commands end well.
    from mmfoundry.pipeline.stage import disk_full

    if disk_full(error):
        name = getattr(error, "filename", None)
        return f"no space left on the disk{f' of {name}' if name else ''}; free some and run the same command again"
    if (
        isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError)
        and error.filename
    ):
        return f"{error.filename}: {(error.strerror or 'cannot be read').lower()}"
    return None


def tell(text: str) -> int:
    """Print an error line, or leave it for the process that started this rank; returns the exit code."""
    path = os.environ.get(ERROR_FILE)
    if path:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    else:
        sys.stdout.flush()
        print(f"error: {text}", file=sys.stderr, flush=True)
    return USER_ERROR
