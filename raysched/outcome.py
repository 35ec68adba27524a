"""How a command ends: its result or error on the right stream, with the right exit code.

With `--json`, stdout holds exactly one JSON object. Libraries, worker processes and C code print
to file descriptor 1 whenever they like, so it points to stderr while a command works, and the
object goes to a copy of the real one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysched.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_RESUMABLE,
    EXIT_USAGE,
    ConfigError,
    UserError,
)
from raysched.signals import STOP


@dataclass(frozen=True)
class Outcome:
    """What a command hands back.

    Attributes:
        payload: the JSON object of `--json`.
        text: what a person gets on stdout instead, after whatever the command printed itself.
        exit_code: the process's exit code.
        problems: lines for stderr, each after `error: `.
    """

    payload: dict[str, Any]
    text: str = ""
    exit_code: int = EXIT_OK
    problems: tuple[str, ...] = ()


def failure(problems: list[str], exit_code: int) -> Outcome:
    """The outcome of a command that could not do its work."""
    payload = {"error": "\n".join(problems), "problems": problems}
    return Outcome(payload, exit_code=exit_code, problems=tuple(problems))


def guarded(work: Callable[[], Outcome]) -> Outcome:
    """Run a command; whatever it raises becomes an outcome."""
    try:
        return work()
    except ConfigError as error:
        return failure(error.problems, error.exit_code)
    except UserError as error:
        return failure([str(error)], error.exit_code)
    except KeyboardInterrupt:
        return failure(["interrupted"], EXIT_INTERRUPTED)
    except BrokenPipeError:
        raise
    except SystemExit as error:
        # Ray's SIGTERM handler leaves this way when the signal comes while Ray starts.
        if STOP.requested or error.code == signal.SIGTERM:
            return stopped_early()
        code = error.code if isinstance(error.code, int) else EXIT_FAILED
        return failure([f"a library ended the process with code {error.code}"], code)
    except Exception as error:  # noqa: BLE001 - the last resort of the whole command
        return _unexpected(error)


def stopped_early() -> Outcome:
    """The outcome of a stop that came before there was anything to save."""
    name = STOP.signal_name or "SIGTERM"
    message = f"stopped by {name} before training began; the same command starts it"
    return Outcome(
        {"status": "stopped", "error": message, "problems": [message]},
        exit_code=EXIT_RESUMABLE,
        problems=(message,),
    )


def _unexpected(error: Exception) -> Outcome:
    details = "".join(traceback.format_exception(error))
    first_line = (str(error).strip().splitlines() or [""])[0]
    message = f"unexpected {type(error).__name__}: {first_line}"
    if os.environ.get("RAYSCHED_DEBUG"):
        sys.stderr.write(details)
        return failure([message], EXIT_FAILED)
    name = f"raysched-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    path = Path(tempfile.gettempdir()) / name
    try:
        path.write_text(details, encoding="utf-8")
    except OSError:
        sys.stderr.write(details)
        return failure([message], EXIT_FAILED)
    return failure([f"{message} (traceback: {path}; RAYSCHED_DEBUG=1 shows it)"], EXIT_FAILED)


def warn(messages: list[str]) -> None:
    """Print warnings to stderr."""
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)


def report(work: Callable[[], Outcome], *, as_json: bool) -> int:
    """Run a command, print its outcome, and return the exit code."""
    _open_streams()
    try:
        with plain_warnings(), _stdout_for_json(as_json) as descriptor:
            outcome = guarded(work)
            for problem in outcome.problems:
                print(f"error: {problem}", file=sys.stderr)
            if descriptor is not None:
                _write_all(descriptor, _one_line(outcome.payload))
        if not as_json and outcome.text:
            print(outcome.text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has left (`| head`): nobody is there to be told; flushing at exit is muted.
        mute(1)
        return EXIT_FAILED
    except OSError as error:
        mute(1)
        print(f"error: stdout can't be written: {error.strerror}", file=sys.stderr)
        return EXIT_FAILED
    return outcome.exit_code


def mute(descriptor: int) -> None:
    """Send what is still written to a stream without a reader nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _open_streams() -> None:
    """Give standard streams that were closed by the caller (`>&-`) a place to write to."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            mute(number)
            setattr(sys, name, os.fdopen(number, "w", closefd=False))


def usage_failure(message: str) -> Outcome:
    """The outcome of a command line that can't be understood."""
    return failure([message], EXIT_USAGE)


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Show the package's own warnings as `warning: ...` lines, and no library's."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    logger = logging.getLogger("raysched")
    logger.addHandler(handler)
    former = warnings.formatwarning
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"raysched(\.|$)")
        warnings.formatwarning = lambda message, *_args, **_more: f"warning: {message}\n"
        try:
            yield
        finally:
            warnings.formatwarning = former
            logger.removeHandler(handler)


@contextlib.contextmanager
def _stdout_for_json(active: bool) -> Iterator[int | None]:
    """Point file descriptor 1 to stderr meanwhile; yields the real stdout's descriptor."""
    if not active:
        yield None
        return
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield real
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)


def _one_line(payload: dict[str, Any]) -> bytes:
    from raysched.training.result import finite_json

    return (json.dumps(finite_json(payload), allow_nan=False) + "\n").encode()


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
