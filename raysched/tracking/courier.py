"""A thread that sends spools: of one run in its own process, or of all runs from the driver.

Importing MLflow and connecting cost about 2.5 s of Python, which slow a training thread in the
same process; so where the driver sees the run folders it carries the points of all trials, and
the trials only write their spools.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from filelock import Timeout

from raysched.tracking.client import UnreachableError, describe
from raysched.tracking.sender import Sender
from raysched.tracking.store import LOGGER, StoreHandle
from raysched.tracking.uris import redact

_FIRST_RETRY_S = 0.5
_LONGEST_RETRY_S = 15.0
_PATIENCE_AWAY_S = 3.0


class Courier:
    """Sends the spools of the watched run folders until it is closed.

    When the store is away it keeps trying, ever more slowly, and says so once.

    Args:
        handle: from `prepare_store`.
        flush_every_s: seconds between two sendings.
    """

    def __init__(self, handle: StoreHandle, *, flush_every_s: float = 2.0) -> None:
        self._handle = handle
        self._uri = redact(handle.uri)
        self._told = self._away = handle.offline
        self._told_put_off = False
        self._flush_every_s = flush_every_s
        self._senders: dict[Path, Sender] = {}
        self._num_told_rejected: dict[Path, int] = {}
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._deadline = self._patience = float("inf")
        self._thread = threading.Thread(target=self._run, name="raysched-courier", daemon=True)
        self._thread.start()

    def watch(self, run_dir: Path) -> None:
        """Send this run's spool from now on; `start_run` must have been called for it."""
        folder = run_dir.absolute()
        # A new dict, because the thread may be iterating over the old one.
        self._senders = {**self._senders, folder: Sender(folder, self._handle.uri)}

    def close(self, timeout_s: float = 30.0) -> None:
        """Send what is pending, at most for `timeout_s`; tell what remains and how to send it."""
        if self._closing.is_set():
            return
        # Waiting long for a store that is away helps nobody; one that is back gets all the time.
        patience_s = min(timeout_s, _PATIENCE_AWAY_S)
        for sender in self._senders.values():
            sender.hurry()
        self._patience, self._deadline = (time.monotonic() + s for s in (patience_s, timeout_s))
        self._closing.set()
        self._wake.set()
        self._thread.join(patience_s)
        if not self._away:
            self._thread.join(timeout_s - patience_s)
        for folder, sender in self._senders.items():
            remaining = sender.spool.num_pending()
            if remaining:
                LOGGER.warning(
                    "%d points are not in MLflow (%s) yet; send them with: raysched sync %s",
                    remaining,
                    self._uri,
                    folder,
                )

    def _run(self) -> None:
        pause = self._flush_every_s
        while True:
            self._wake.wait(pause)
            closing = self._closing.is_set()
            done = self._send_all()
            if done:
                pause = self._flush_every_s
            else:
                pause = min(max(2 * pause, _FIRST_RETRY_S), _LONGEST_RETRY_S)
            if closing:
                if done or self._is_late():
                    return
                self._wake.clear()
                pause = min(pause, _FIRST_RETRY_S)

    def _send_all(self) -> bool:
        """Send every spool; True if nothing is left of what they held."""
        done = True
        for folder, sender in self._senders.items():
            try:
                done = self._send(folder, sender) and done
            except UnreachableError as error:
                self._away = True
                self._tell(error, folder)
                return False  # it is away for the others as well
        self._away = self._away and not done
        return done

    def _send(self, folder: Path, sender: Sender) -> bool:
        try:
            sender.send(self._stops_between_batches)
        except Timeout:
            return False  # another process is sending it
        except UnreachableError:
            raise
        except Exception as error:  # noqa: BLE001 (the thread must outlive every failure)
            self._tell(error, folder)
            return False
        finally:
            self._tell_rejected(folder, sender)
            self._tell_put_off(folder, sender)
        return not self._is_late()

    def _stops_between_batches(self) -> bool:
        """Asked when the store has taken a batch, so it is there."""
        self._away = False
        return self._is_late()

    def _is_late(self) -> bool:
        return time.monotonic() > (self._patience if self._away else self._deadline)

    def _tell(self, error: Exception, folder: Path) -> None:
        if self._told:
            return
        self._told = True
        fault = "does not answer" if isinstance(error, UnreachableError) else "fails"
        LOGGER.warning(
            "MLflow at %s %s (%s). Training goes on, the points are kept and sent when it is "
            "back, or later with: raysched sync %s",
            self._uri,
            fault,
            describe(error),
            folder,
        )

    def _tell_put_off(self, folder: Path, sender: Sender) -> None:
        if self._told_put_off or not sender.put_off_reason:
            return
        self._told_put_off = True
        LOGGER.warning(
            "MLflow at %s takes points but not files (%s). They are kept and tried again, later "
            "with: raysched sync %s",
            self._uri,
            sender.put_off_reason,
            folder,
        )

    def _tell_rejected(self, folder: Path, sender: Sender) -> None:
        if sender.num_rejected == self._num_told_rejected.get(folder, 0):
            return
        self._num_told_rejected[folder] = sender.num_rejected
        LOGGER.warning(
            "MLflow refuses %d entries; they are kept, with the reason, in %s",
            sender.num_rejected,
            sender.spool.rejected_path,
        )
