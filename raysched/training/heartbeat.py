"""A sign of life of every rank: a small file that a thread rewrites while training goes on.

The file says two things: that the process runs (a count that rises with every beat) and that it
gets on (step, and the network's calls). Whoever watches (`raysched.distributed.watchdog`) needs
no clock in common with the rank: it looks whether the numbers change. SIGUSR1 makes a rank write
the stacks of all its threads next to the file, also while it is stuck in C code.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

WORKERS_FOLDER = "workers"
# Records have one length and are rewritten in place: that needs no space on a full disk.
RECORD_BYTES = 512
DUMP_SIGNAL = signal.SIGUSR1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beat:
    """What a rank's file says.

    Attributes:
        attempt: names the start of the run that the rank belongs to.
        rank: its number.
        pid: its process.
        started: when the process began, in seconds since 1970: a number is given out again.
        node: id of its node in the cluster, empty without one.
        beats: rises with every beat.
        step: optimizer steps done.
        work: step and network calls in one word; changes while the rank gets on.
        ended: its loop is over; nothing is to be expected any more.
    """

    attempt: str
    rank: int
    pid: int
    started: float
    node: str
    beats: int
    step: int
    work: str
    ended: bool = False


def beat_file(run_dir: Path, rank: int) -> Path:
    """Where a rank's sign of life is."""
    return run_dir / WORKERS_FOLDER / f"rank-{rank:05d}.json"


def stack_file(run_dir: Path, rank: int) -> Path:
    """Where a rank writes its stacks."""
    return run_dir / WORKERS_FOLDER / f"rank-{rank:05d}.stacks.txt"


def read_beats(run_dir: Path, attempt: str) -> list[Beat]:
    """The newest beat of each rank of a start; one that is being written is left out."""
    beats = []
    for path in sorted((run_dir / WORKERS_FOLDER).glob("rank-*.json")):
        with contextlib.suppress(ValueError, TypeError, FileNotFoundError):
            beat = Beat(**json.loads(path.read_text(encoding="utf-8")))
            beats += [beat] if beat.attempt == attempt else []
    return beats


class Heartbeat:
    """Writes one rank's beats.

    Args:
        run_dir: the run's folder.
        rank: this rank.
        attempt: see `Beat`.
        node: see `Beat`.
        interval_s: seconds between beats.
    """

    def __init__(
        self, run_dir: Path, rank: int, *, attempt: str, node: str, interval_s: float
    ) -> None:
        self._run_dir, self._rank, self._attempt, self._node = run_dir, rank, attempt, node
        self._interval_s, self._beats, self._over = interval_s, 0, threading.Event()
        # Linux and psutil agree on this to a hundredth of a second.
        self._started = _started(os.getpid())

    @contextlib.contextmanager
    def beating(self, progress: Callable[[], tuple[int, str]]) -> Iterator[None]:
        """Beat meanwhile.

        Args:
            progress: steps done, and a word that changes while the rank gets on.
        """
        path = beat_file(self._run_dir, self._rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        stacks = stack_file(self._run_dir, self._rank).open("a", encoding="utf-8")
        # Stays registered to the process's end: unhandled, the signal would kill it.
        faulthandler.register(DUMP_SIGNAL, file=stacks, all_threads=True, chain=False)
        thread = threading.Thread(
            target=self._beat, args=(path, progress), name="raysched-heartbeat", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join(timeout=5.0)
            self._write(path, *progress(), ended=True)

    def _beat(self, path: Path, progress: Callable[[], tuple[int, str]]) -> None:
        while not self._over.is_set():
            self._write(path, *progress())
            self._over.wait(self._interval_s)

    def _write(self, path: Path, step: int, work: str, *, ended: bool = False) -> None:
        self._beats += 1
        beat = Beat(
            attempt=self._attempt,
            rank=self._rank,
            pid=os.getpid(),
            started=self._started,
            node=self._node,
            beats=self._beats,
            step=step,
            work=work,
            ended=ended,
        )
        record = json.dumps(asdict(beat)).encode().ljust(RECORD_BYTES - 1) + b"\n"
        try:
            # Opened anew each time: on NFS others see what was closed.
            handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(handle, record, 0)
            finally:
                os.close(handle)
        except OSError as error:
            log.warning("%s: no sign of life can be written: %s", path, error.strerror)


def _started(pid: int) -> float:
    import psutil

    return round(float(psutil.Process(pid).create_time()), 2)


def dump_stacks(beat: Beat, run_dir: Path, *, kill: bool, wait_s: float = 3.0) -> str | None:
    """Make a process of this machine write its stacks, and end it if that is wished.

    Args:
        beat: the process.
        run_dir: the run's folder.
        kill: end it afterwards; a stopped process is woken for its last words.
        wait_s: how long its stacks are waited for.

    Returns:
        The state that the system gave it (`sleeping`, `stopped`, …); None if it is gone.
    """
    import psutil

    try:
        process = psutil.Process(beat.pid)
        if abs(process.create_time() - beat.started) > 1.0:
            return None
        state = str(process.status())
        if state == psutil.STATUS_ZOMBIE:
            return None
        stacks = stack_file(run_dir, beat.rank)
        before = stacks.stat().st_size
        os.kill(beat.pid, DUMP_SIGNAL)
        if kill and state == psutil.STATUS_STOPPED:
            os.kill(beat.pid, signal.SIGCONT)
        _wait_for_text(stacks, before, wait_s)
        if kill:
            os.kill(beat.pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
        return None
    return state


def _wait_for_text(path: Path, size: int, wait_s: float) -> None:
    """Wait until a file has grown beyond `size` and grows no more."""
    deadline, last = time.monotonic() + wait_s, size
    while time.monotonic() < deadline:
        time.sleep(0.05)
        now = path.stat().st_size
        if now == last > size:
            return
        last = now


def clear_beats(run_dir: Path) -> None:
    """Remove the signs of life of an ended run; stacks that were written stay."""
    folder = run_dir / WORKERS_FOLDER
    if any(path.stat().st_size for path in folder.glob("*.stacks.txt")):
        for path in folder.glob("rank-*.json"):
            path.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
