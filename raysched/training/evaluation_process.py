"""Evaluations in a process of their own beside a training without Ray.

`python -m raysched.training.evaluation_process THREADS` reads the folders of snapshots from its
input, one per line, and answers each with a line: `done`, or why it failed. It ends with its
input, so it outlives a killed training by one evaluation at most. Its priority is low: on a
machine without a spare core the training goes first.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from pathlib import Path

from raysched.training.protocols import EvaluationEnd
from raysched.training.snapshots import evaluate_snapshot, forget_start

DONE = "done"
LOG_FILE = "process.log"
NICENESS = 10


class ProcessEvaluator:
    """An `Evaluator` that keeps one process, started with the first snapshot.

    Args:
        num_threads: torch threads of the process, those of the training for the same numbers.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Path | None = None

    def start(self, folder: Path) -> None:
        """Hand a snapshot to the process."""
        forget_start(folder)
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = self._launch(folder.parent / LOG_FILE)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{folder}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            # It has just died; `poll` finds that out and tells it.
            return

    def _launch(self, log: Path) -> subprocess.Popen[bytes]:
        self._log = log
        command = [sys.executable, "-m", "raysched.training.evaluation_process"]
        with log.open("ab") as stderr:
            return subprocess.Popen(
                [*command, str(self._num_threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                # Ctrl-C in a terminal is for the training, which saves and then ends this.
                start_new_session=True,
            )

    def poll(self, timeout_s: float) -> EvaluationEnd | None:
        """How the evaluation ended; None while it runs."""
        process = self._process
        assert process is not None, "poll follows start"
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], timeout_s)
        if not ready:
            return None
        line = process.stdout.readline().decode().strip()
        if line == DONE:
            return EvaluationEnd()
        if line:
            return EvaluationEnd(line)
        code = process.wait()
        return EvaluationEnd(f"its process ended with code {code}; see {self._log}")

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._process.kill()
        self._process.wait()
        self._process = None


def serve(num_threads: int) -> None:
    """Evaluate the snapshots whose folders come in."""
    import torch

    # Answers alone go to the pipe; what libraries print goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.nice(NICENESS)
    torch.set_num_threads(num_threads)
    for line in sys.stdin:
        try:
            evaluate_snapshot(Path(line.rstrip("\n")))
            answer = DONE
        except Exception as error:  # noqa: BLE001 - told to the training, which warns
            text = " ".join(str(error).split())
            answer = f"{type(error).__name__}: {text}"
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
