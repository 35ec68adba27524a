"""What the driver makes of the ends of trials."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from raysched.tuning.journal import Journal
from raysched.tuning.monitor import Monitor


def ended(status: str, **more: object) -> dict[str, object]:
    return {"ended": True, "status": status, "error": "it was so", "again": False, **more}


@pytest.mark.parametrize(
    ("end", "again"),
    [(ended("stopped", again=True), [1]), (ended("stopped"), []), (ended("failed"), [])],
)
def test_only_a_trial_that_lost_its_place_is_queued_once_more(tmp_path, end, again):
    journal, queued = Journal(tmp_path), []
    journal.append("suggested", 1, baseline=False, assignments={}, run_dir=str(tmp_path))
    monitor = Monitor(
        journal,
        lambda record: None,
        show=lambda event, record: None,
        requeue=lambda record: queued.append(record.number),
    )
    trial = SimpleNamespace(config={"trial_number": 1})
    monitor.on_trial_result(0, [], trial, end)
    assert queued == again
    assert journal.records[1].status == end["status"]


def test_the_driver_looks_around_while_nothing_is_reported(tmp_path):
    looks: list[int] = []
    monitor = Monitor(
        Journal(tmp_path),
        lambda record: None,
        show=lambda event, record: None,
        look=lambda: looks.append(1),
    )
    monitor.on_step_begin(0, [])
    assert looks == [1]
