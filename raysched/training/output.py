"""What a process prints, kept in the folder of its run or trial.

Ray writes the output of a process to its own session folder, which is gone after the next reboot
and holds the words of everything that the process has run.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def captured(path: Path) -> Iterator[None]:
    """While it lasts, stdout and stderr of this process, C libraries included, go to a file.

    Args:
        path: appended to; a file that nothing was written to is removed.
    """
    _flush()
    saved = [os.dup(number) for number in (1, 2)]
    with path.open("ab") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    try:
        yield
    finally:
        _flush()
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        if not path.stat().st_size:
            path.unlink()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):
            stream.flush()
