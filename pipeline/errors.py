"""The errors that a user can cause, each one line that names what is wrong and the way out.

The command line prints them as `error: ...` and ends with exit code 2; any other exception is a bug of ours and keeps
its traceback.
"""

import errno

PREEMPTED_EXIT_CODE = 85  # the run saved its state because it was told to stop, and wants to be started again


class MmfoundryError(Exception):
    """A user error. Its text is one line that names the key, file, line or sample, and what to do."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class ConfigError(MmfoundryError, ValueError):
    """A config or recipe says something that cannot be meant: an unknown key, a wrong type, a bad reference."""


class UnknownName(MmfoundryError, ValueError):
    """A registry, recipe or command has nothing of this name; the text lists the names that it has.

    A `ValueError`, so that one raised in a config's validator is reported with the key's dotted path.
    """


class MissingInput(MmfoundryError):
    """A file, folder, artifact, hub repository or package that a stage needs is not there."""


class TooManyUnreadable(MmfoundryError):
    """More samples could not be read than the config allows; the text counts them by reason."""


class UnknownColumn(MmfoundryError, ValueError):
    """A filter names a metadata column that the pool lacks.

    A `ValueError`, so that one raised in a config's validator is reported with the key's dotted path.
    """


class DamagedInput(MmfoundryError):
    """A file is there but its content is not what it must be: cut off, altered, or in another format."""


class NotEnoughSpace(MmfoundryError):
    """A disk is full, or too full for what is about to be written."""


class StorageError(MmfoundryError):
    """A server or bucket does not give what it must: no answer after all retries, no access, or no ranges."""


def disk_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that a disk is full.

    Rust writers (safetensors, polars) and torch wrap the system's error in their own; only its text is left.
    """
    while True:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        cause = error.__cause__ or error.__context__
        if cause is None:
            return False
        error = cause
