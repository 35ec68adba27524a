"""What becomes of the errors of workers: known to the driver, logged, and told in one message.

Ray Train starts the group again after any error. One that the next start would only meet again, a
user's mistake or memory that ran out, is kept in the run's folder under the name of the start, and
the next group ends with it at once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from raysched.config.run import RunConfig
from raysched.errors import ConfigError, DataError, LostResourcesError, RunFailedError, UserError
from raysched.models.checkpoint_files import NewerFormatError
from raysched.models.pickles import PickleError
from raysched.training.events import note_event
from raysched.training.out_of_memory import StepMemoryError, advice, is_out_of_memory

FATAL_FILE = ".fatal"
# The user's mistakes: they end the command as they would without workers, exit code and all.
MISTAKES = (ConfigError, DataError, NewerFormatError, PickleError)
# What Ray says of a process that went with its node.
NODE_LOST = ("node has died", "node died", "node is dead", "node was terminated", "NodeDied")


def set_fatal(run_dir: Path, attempt: str, error: UserError) -> None:
    """Keep an error that another start of the group would only meet again."""
    # A disk that is full has no room for this file either; the error itself is on its way.
    with contextlib.suppress(OSError):
        text = f"{attempt}\n{type(error).__name__}\n{error}"
        (run_dir / FATAL_FILE).write_text(text, encoding="utf-8")


def fatal(run_dir: Path, attempt: str) -> tuple[str, str]:
    """Class and message of a start's fatal error, empty without one."""
    path = run_dir / FATAL_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    whose, _, rest = text.partition("\n")
    kind, _, message = rest.partition("\n")
    return (kind, message) if whose == attempt else ("", "")


def raise_fatal(run_dir: Path, attempt: str) -> None:
    """In the driver: raise what the workers kept, where it is more than the result of a run.

    Raises:
        ConfigError, DataError, NewerFormatError, PickleError: a mistake of the user's.
        StepMemoryError: memory ran out.
    """
    kind, message = fatal(run_dir, attempt)
    for known in (*MISTAKES, StepMemoryError):
        if kind == known.__name__:
            raise known(message)


def note_failures(
    config: RunConfig, run_dir: Path, attempt: str, errors: Mapping[int, Exception]
) -> None:
    """In the controller: log who was lost; memory that ran out is no matter of another start."""
    for rank, error in sorted(errors.items()):
        note_event(run_dir, f"rank {rank} was lost: {cause(error)}")
    killed = [error for error in errors.values() if is_out_of_memory(error)]
    if killed and not fatal(run_dir, attempt)[0]:
        set_fatal(run_dir, attempt, StepMemoryError(f"a worker was killed: {advice(config)}"))


def cause(error: BaseException) -> str:
    """The line of a library's error that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Ray guesses at length why a process might be gone; the log of the worker has it all.
    return lines[-1].partition(" Some common causes")[0] if lines else type(error).__name__


def node_lost(text: str) -> bool:
    """Whether Ray's words about a process that is gone say that its node took it along."""
    return any(words in text for words in NODE_LOST)


def as_user_error(error: BaseException, run_dir: Path) -> BaseException:
    """A clear message for what the workers raised; interrupts pass through."""
    failures = list(getattr(error, "worker_failures", {}).values())
    for known in (error, *failures):
        if isinstance(known, UserError | KeyboardInterrupt | SystemExit):
            return known
    reasons = [str(failure) for failure in failures] or [str(error)]
    everything = run_dir / "worker-error.txt"
    with contextlib.suppress(OSError):
        everything.write_text("\n\n".join(reasons) + os.linesep, encoding="utf-8")
    lost = any(node_lost(reason) for reason in reasons)
    return (LostResourcesError if lost else RunFailedError)(
        f"{run_dir}: the workers failed: {cause(failures[0] if failures else error)} "
        f"(all of it in {everything}); what was computed is kept: go on with --resume"
    )
