"""Submitted jobs: follow their logs, stop them, and end with their exit codes.

Logs are asked for again and again rather than streamed: a stream that drops looks like an end,
while what was printed so far can always be asked for once more.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from raysched.distributed.job_server import JobServer, ServerAwayError
from raysched.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_RESUMABLE, ConfigError

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
POLL_S = 0.5
# Long logs are asked for less often.
BYTES_PER_S = 2_000_000
RECONNECT_S = 600.0
# An ended job's last lines are waited for so long: the node that had them may be gone.
LAST_LINES_S = 15.0


def exit_code(job: dict[str, Any]) -> int:
    """A finished job's own exit code; one that was stopped is never 0."""
    code = job.get("driver_exit_code")
    if job["status"] == "STOPPED":
        return code or EXIT_RESUMABLE
    if job["status"] == "SUCCEEDED":
        return EXIT_OK
    # Ended by a signal: as shells count.
    return 128 - code if code is not None and code < 0 else code or EXIT_FAILED


def find_job(server: JobServer, submission_id: str) -> dict[str, Any]:
    """A job's details.

    Raises:
        ConfigError: there is none of this id.
    """
    found = server.job(submission_id)
    if found is None:
        known = ", ".join(job["submission_id"] for job in server.jobs()[:5]) or "none"
        raise ConfigError(f"no job {submission_id} at {server.address}; the newest: {known}")
    return found


class LogPrinter:
    """Prints of a job's logs what was not printed before.

    Args:
        out: where they go.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._printed = 0

    def show(self, text: str) -> None:
        """Print the new end of `text`, which is everything that the job has said so far."""
        new = text[self._printed :]
        # Counted first: an interrupt must not print a line twice.
        self._printed = max(self._printed, len(text))
        if new:
            self._out.write(new)
            self._out.flush()


def follow(
    server: JobServer,
    submission_id: str,
    printer: LogPrinter,
    *,
    patience_s: float = RECONNECT_S,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Print a job's logs until it ends, over lost connections.

    Args:
        server: the cluster.
        submission_id: the job.
        printer: gets the logs; one that has printed some of them goes on behind those.
        patience_s: seconds without an answer after which this gives up; the job goes on.
        sleep: waits between two looks.

    Returns:
        The finished job's details.

    Raises:
        ServerAwayError: no answer for `patience_s`.
    """
    away_since = None
    while True:
        job: dict[str, Any] = {}
        try:
            job = find_job(server, submission_id)
            text = server.logs(submission_id)
        except ServerAwayError as error:
            now = time.monotonic()
            has_ended = job.get("status") in ENDED
            if away_since is None:
                away_since = now
                state = "has ended" if has_ended else "goes on"
                print(f"warning: {error}; the job {state}, trying again", file=sys.stderr)
            if has_ended and now - away_since > min(LAST_LINES_S, patience_s):
                print("warning: the job's last lines are lost", file=sys.stderr)
                return job
            if now - away_since > patience_s:
                raise ServerAwayError(
                    f"{error} for {patience_s:.0f} s; {goes_on(server, submission_id)}"
                ) from error
            sleep(POLL_S)
            continue
        away_since = None
        printer.show(text)
        if job["status"] in ENDED:
            return job
        sleep(max(POLL_S, len(text) / BYTES_PER_S))


def attend(server: JobServer, submission_id: str, out: TextIO) -> tuple[int, str]:
    """Follow a job to its end; Ctrl-C asks whether to stop it or to leave it running.

    Returns:
        The exit code, and the job's last status.
    """
    asked, printer = False, LogPrinter(out)
    while True:
        try:
            job = follow(server, submission_id, printer)
        except KeyboardInterrupt:
            if not asked and _wants_stop(submission_id):
                asked = True
                server.stop(submission_id)
                print("asked to stop; following it to its end", file=sys.stderr)
                continue
            print(goes_on(server, submission_id), file=sys.stderr)
            return EXIT_INTERRUPTED, "RUNNING"
        return exit_code(job), str(job["status"])


def goes_on(server: JobServer, submission_id: str) -> str:
    """How to come back to a job that is left alone."""
    where = f"--address {server.address}"
    return (
        f"the job goes on: `raysched jobs logs {submission_id} {where}` follows it, "
        f"`raysched jobs stop {submission_id} {where}` ends it"
    )


def _wants_stop(submission_id: str) -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        print(
            f"\nstop {submission_id}, or leave it running? [s/L] ",
            end="",
            file=sys.stderr,
            flush=True,
        )
        return sys.stdin.readline().strip().lower() in ("s", "stop")
    except KeyboardInterrupt:
        return False
