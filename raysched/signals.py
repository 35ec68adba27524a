"""SIGTERM, SIGHUP and Ctrl-C: the first asks for a clean, resumable stop, a second Ctrl-C
interrupts.

Installed before anything heavy is imported, so that a signal during the start counts too. Ray's
`init` puts its own SIGTERM handler in place: `STOP.restore()` after it takes the place back.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

StopCallback = Callable[[str], None]


class StopRequest:
    """Whether this process was asked to stop, and who wants to hear of it."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._callbacks: list[StopCallback] = []
        self._installed = False

    @property
    def requested(self) -> bool:
        """True from the first signal on."""
        return self.signal_name is not None

    def install(self) -> None:
        """Handle the three signals; may be repeated, does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)
        # The terminal went away; under nohup the signal stays ignored.
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._handle)
        self._installed = True

    def restore(self) -> None:
        """Handle the signals again, if this process did so before a library took them."""
        if self._installed:
            self.install()

    def register(self, callback: StopCallback) -> None:
        """Call `callback(signal_name)` at the first signal; at once if it has already come."""
        self._callbacks.append(callback)
        if self.signal_name is not None:
            callback(self.signal_name)

    def unregister(self, callback: StopCallback) -> None:
        """Forget a callback, once what it stops has ended."""
        self._callbacks.remove(callback)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            for callback in list(self._callbacks):
                callback(self.signal_name)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


# One per process, as signals are: the commands install it, the launcher registers with it.
STOP = StopRequest()
