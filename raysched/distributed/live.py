"""What a training run shows while it goes on: a live line or two on a terminal, nothing elsewhere.

They are the newest point of the run's `metrics.jsonl`, wherever the workers are: no channel to
them is needed, and they are never waited for.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysched.training.costs import SHARES
from raysched.training.run_folder import read_last_point

if TYPE_CHECKING:
    from rich.console import Console

REFRESH_S = 1.0
# Smaller shares would only make the line longer.
LEAST_SHARE = 0.005


@contextlib.contextmanager
def live_status(console: Console, run_dir: Path) -> Iterator[None]:
    """Show how the run goes meanwhile, on a terminal only.

    Args:
        console: where; lines that are printed there appear above.
        run_dir: the run's folder.
    """
    if not console.is_terminal:
        yield
        return
    from rich.live import Live
    from rich.text import Text

    over = threading.Event()
    display = Live(
        Text("starting"),
        console=console,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
        transient=True,
    )
    with display as live, _warnings_above(console):

        def follow() -> None:
            while not over.wait(REFRESH_S):
                point = read_last_point(run_dir)
                if point is not None:
                    live.update(Text(status_line(point)), refresh=True)

        thread = threading.Thread(target=follow, name="raysched-live", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(timeout=5.0)


class _Above:
    """A stream whose lines a console shows above what is live on it."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def write(self, text: str) -> None:
        if text.strip():
            self._console.print(text.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)

    def flush(self) -> None:
        """Nothing waits."""


@contextlib.contextmanager
def _warnings_above(console: Console) -> Iterator[None]:
    """Keep warnings that go to the same terminal from running into the live lines."""
    found = [
        (handler, handler.stream)
        for handler in logging.getLogger("raysched").handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream.isatty()
    ]
    for handler, _ in found:
        handler.setStream(_Above(console))
    try:
        yield
    finally:
        for handler, stream in found:
            handler.setStream(stream)


def status_line(point: Mapping[str, Any]) -> str:
    """A logged point in two short lines: progress, loss, speed; where the time goes.

    Args:
        point: a line of `metrics.jsonl` with training metrics.
    """
    found = {
        key.removeprefix("compute/"): value
        for key, value in point["metrics"].items()
        if value is not None
    }
    parts = [f"step {point['step']:,}, {point['forward_equivalents']:,.0f} FE"]
    if "fraction" in found:
        parts[0] += f" ({min(found['fraction'], 1.0):.0%})"
    if "train/loss" in found:
        parts.append(f"loss {found['train/loss']:.4g}")
    speed, *where = speed_words(found) or [""]
    return " | ".join([*parts, speed]) + "\n" + " | ".join(where)


def speed_words(found: Mapping[str, float]) -> list[str]:
    """Speed, shares, utilisation and spread in words, as far as they are known.

    Args:
        found: names as in a result's `compute`.
    """
    words = []
    if "fe_per_second" in found:
        speed = f"{found['fe_per_second']:,.0f} FE/s, {found['samples_per_second']:,.0f} samples/s"
        words.append(speed)
        shares = {name: found.get(f"share_{name}", 0.0) for name in (*SHARES, "other")}
        large = sorted(shares.items(), key=lambda item: -item[1])
        words.append(", ".join(f"{n} {share:.0%}" for n, share in large if share >= LEAST_SHARE))
    if "mfu" in found:
        words.append(f"MFU {found['mfu']:.1%}")
    if "rank_spread" in found:
        words.append(f"slowest rank {found['rank_spread']:.2f}x the fastest")
    return words
