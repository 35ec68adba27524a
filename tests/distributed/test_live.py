"""The live lines of a run: on a terminal, from the log, in words."""

from __future__ import annotations

import io
import json
import logging
import time

import pytest
from rich.console import Console

from raysched.distributed.live import live_status, status_line
from raysched.training.run_folder import read_last_point
from tests.training.runs import run_loop, small_config

METRICS = {
    "train/loss": 0.25,
    "compute/fraction": 0.5,
    "compute/fe_per_second": 1234.4,
    "compute/samples_per_second": 300.0,
    "compute/share_backward": 0.5,
    "compute/share_forward": 0.3,
    "compute/share_checkpoint": 0.001,
    "compute/share_other": 0.199,
    "compute/mfu": 0.314,
    "compute/rank_spread": 1.08,
}
POINT = {"step": 1200, "forward_equivalents": 5000, "seconds": 9.0, "metrics": METRICS}


def test_the_lines_say_progress_speed_and_where_the_time_goes():
    first, second = status_line(POINT).splitlines()
    assert first == "step 1,200, 5,000 FE (50%) | loss 0.25 | 1,234 FE/s, 300 samples/s"
    words = "backward 50%, forward 30%, other 20% | MFU 31.4% | slowest rank 1.08x the fastest"
    assert second == words


def test_the_last_point_is_found_behind_evaluations_and_torn_lines(tmp_path):
    assert read_last_point(tmp_path) is None
    evaluation = {**POINT, "step": 1300, "metrics": {"quality/q": 1.0}}
    whole = [json.dumps(p) for p in ({**POINT, "step": 1100}, POINT, evaluation)]
    torn = json.dumps({**POINT, "step": 1400})[:-9]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*whole, torn]))
    assert read_last_point(tmp_path) == POINT


def test_a_terminal_shows_the_newest_point_and_a_file_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("raysched.distributed.live.REFRESH_S", 0.02)
    run_loop(small_config(training__budget__steps=2), tmp_path)
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=200)
        deadline = time.monotonic() + 10.0
        with live_status(console, tmp_path):
            while terminal and "step 2" not in out.getvalue():
                assert time.monotonic() < deadline, "no live line within 10 s"
                time.sleep(0.01)
        assert ("samples/s" in out.getvalue()) == terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_a_warning_on_the_same_terminal_stands_above_the_live_lines(tmp_path, kind):
    screen, other = Terminal(), kind()
    console = Console(file=screen, force_terminal=True, width=60)
    handler = logging.StreamHandler(other)
    logger = logging.getLogger("raysched")
    logger.addHandler(handler)
    try:
        with live_status(console, tmp_path):
            logger.warning("the distance is [unreliable]: " + "few images " * 9)
        logger.warning("afterwards")
    finally:
        logger.removeHandler(handler)
    above = [line.strip() for line in screen.getvalue().split("\n") if "[unreliable]" in line]
    # Where stderr is a file, it gets the warning as ever.
    assert len(above) == (kind is Terminal)
    assert ("[unreliable]" in other.getvalue()) == (kind is io.StringIO)
    assert other.getvalue().endswith("afterwards\n")
    if above:
        assert not above[0].split("the distance")[0].endswith("starting")
