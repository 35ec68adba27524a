"""Errors that are meant for the user, and the exit codes that the commands return."""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_RESUMABLE = 75
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Something that the user can mend; shown as one message, never with a traceback."""

    exit_code = EXIT_USAGE


class ConfigError(UserError, ValueError):
    """One or more mistakes in a configuration, all of them listed at once.

    Args:
        problems: one line per mistake: file, path, rule, value, and how to mend it.
    """

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        return (type(self), (self.problems,))


class DataError(UserError):
    """A data source is missing, corrupt or unreadable."""


class StorageError(UserError):
    """An output folder, cache or checkpoint can't be used as asked."""


class RunFailedError(UserError):
    """A run ended before its budget was spent (NaN loss, lost worker); work so far is kept."""

    exit_code = EXIT_FAILED


class LostResourcesError(UserError):
    """CPUs or GPUs were lost, or in use by others for too long: no fault of the run itself."""

    exit_code = EXIT_FAILED
