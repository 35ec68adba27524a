"""The time between SIGTERM and the end: what can't be saved in it is left to the last checkpoint.

Whoever preempts a machine kills what is still there after a while (Kubernetes: 30 s). A command
that ends by itself before that says what is kept, and returns the exit code that means resumable.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from raysched.signals import STOP


class GraceOver(BaseException):
    """The grace period has passed before the checkpoint was written; no handler may swallow it."""


@contextlib.contextmanager
def grace_period(seconds: float | None) -> Iterator[None]:
    """From the first stop signal on, let the block run for `seconds` at most.

    Raises:
        GraceOver: in the main thread, when the time is up.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(_number: int, _frame: FrameType | None) -> None:
        raise GraceOver

    def begin(name: str) -> None:
        # Ctrl-C has a person behind it, who can press it again.
        if name == "SIGTERM":
            signal.setitimer(signal.ITIMER_REAL, seconds)

    former = signal.signal(signal.SIGALRM, over)
    STOP.register(begin)
    try:
        yield
    finally:
        STOP.unregister(begin)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, former)
