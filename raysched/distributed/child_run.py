"""`raysched train` as a child process that is watched, killed, and never left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from raysched.errors import RunFailedError
from raysched.signals import STOP
from raysched.training.run_folder import METRICS_FILE

POLL_S = 0.02
# SIGKILL works at once, except on a process that waits for a disk.
DEATH_S = 30.0
TAIL_LINES = 3


class ChildRun:
    """A run in a process of its own; a context whose end kills whatever is left of it.

    Args:
        config: the file to train.
        run_dir: its folder; what the child says goes to `<run_dir>.log`.
        options: further tokens of the command line.
    """

    def __init__(self, config: Path, run_dir: Path, options: tuple[str, ...] = ()) -> None:
        self.run_dir, self.log = run_dir, run_dir.with_name(f"{run_dir.name}.log")
        command = [sys.executable, "-m", "raysched", "train", str(config)]
        command += [f"training.output_dir={run_dir}", *options]
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C reaches this process, which ends the child itself.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=config.parent,
                start_new_session=True,
            )

    def __enter__(self) -> ChildRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    @property
    def code(self) -> int | None:
        """Its exit code; negative for a signal."""
        return self._process.poll()

    def kill(self) -> None:
        """SIGKILL to the command, then to what it started and did not take along.

        Raises:
            RunFailedError: something survives that.
        """
        started = self.processes()[1:]
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=DEATH_S)
        import psutil

        # Ray's own processes end with the command; they get a moment to do it their way.
        _, alive = psutil.wait_procs(started, timeout=2.0)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _, alive = psutil.wait_procs(alive, timeout=DEATH_S)
        if alive:
            raise RunFailedError(
                f"{self.run_dir}: processes {', '.join(str(p.pid) for p in alive)} don't end"
            )

    def processes(self) -> list[Any]:
        """The command's process and all that it has started, as psutil knows them; its own first.

        Empty once it is gone.
        """
        import psutil

        try:
            own = psutil.Process(self._process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def failure(self, what: str) -> RunFailedError:
        """An error that quotes the last words of the child.

        Args:
            what: what it did.
        """
        text = self.log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.strip().splitlines() if line.strip()]
        said = " / ".join(lines[-TAIL_LINES:]) or "nothing"
        code = "" if self.code is None else f" (exit code {self.code})"
        return RunFailedError(f"{self.run_dir}: the run {what}{code}; it said: {said}")


def wait_for(child: ChildRun, done: Callable[[], bool], *, stall_s: float) -> None:
    """Wait as long as the child's run gets on.

    Args:
        child: the run.
        done: what is waited for.
        stall_s: seconds without a new point or word after which the run counts as stuck.

    Raises:
        RunFailedError: it stood still.
        KeyboardInterrupt: this process was asked to stop.
    """
    seen, since = _signs(child), time.monotonic()
    while not done():
        if STOP.requested:
            raise KeyboardInterrupt
        now = _signs(child)
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > stall_s:
            raise child.failure(f"stood still for {stall_s:.0f} s")
        time.sleep(POLL_S)


def _signs(child: ChildRun) -> list[int]:
    """Sizes of what grows while a run gets on."""
    sizes = []
    for path in (child.log, child.run_dir / METRICS_FILE):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return sizes
