import json
import math
import os

import pytest

from raysched.errors import StorageError
from raysched.tuning.journal import Journal, read_events
from raysched.tuning.records import Point


def suggest(journal: Journal, number: int, **settings) -> None:
    journal.append("suggested", number, baseline=number == 0, assignments=settings, run_dir="r")


def test_records_read_back_are_those_of_the_session_that_wrote_them(tmp_path):
    journal = Journal(tmp_path)
    suggest(journal, 0)
    suggest(journal, 1, k=3)
    journal.append("started", 0)
    journal.append("started", 1)
    journal.append("report", 1, q=0.5, q_low=0.4, q_high=0.6, forward_equivalents=100.0)
    journal.append("report", 1, q=0.3, q_low=0.2, q_high=0.4, forward_equivalents=200.0)
    journal.append(
        "ended", 1, status="finished", q=0.31, q_low=0.2, q_high=0.4, forward_equivalents=201.0,
        seconds=3.5, q_epsilon_scaled=0.29,
    )  # fmt: skip
    again = Journal(tmp_path)
    assert again.records == journal.records
    assert again.records[0].status == "running"
    one = again.records[1]
    assert (one.status, one.q, one.seconds, one.assignments) == ("finished", 0.31, 3.5, {"k": 3})
    assert one.q_epsilon_scaled == one.as_json()["q_epsilon_scaled"] == 0.29
    assert one.curve == [Point(100.0, 0.5), Point(200.0, 0.3)]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_dropped_and_the_next_event_stands_on_its_own(tmp_path, cut):
    journal = Journal(tmp_path)
    suggest(journal, 0)
    suggest(journal, 1, k=3)
    os.truncate(journal.path, journal.path.stat().st_size - cut)
    again = Journal(tmp_path)
    assert list(again.records) == [0]
    suggest(again, 1, k=4)
    assert Journal(tmp_path).records[1].assignments == {"k": 4}


def test_every_prefix_of_a_journal_can_be_read(tmp_path):
    journal = Journal(tmp_path)
    for number in range(3):
        suggest(journal, number, k=number)
        journal.append("started", number)
        journal.append("report", number, q=0.1, forward_equivalents=1.0)
        journal.append("ended", number, status="finished", q=0.1, forward_equivalents=4.0)
    content = journal.path.read_bytes()
    for length in range(0, len(content), 7):
        journal.path.write_bytes(content[:length])
        complete = content[:length].count(b"\n")
        assert len(read_events(journal.path)) == complete


def test_damage_in_the_middle_names_its_line(tmp_path):
    journal = Journal(tmp_path)
    suggest(journal, 0)
    suggest(journal, 1)
    lines = journal.path.read_text().splitlines()
    journal.path.write_text("\n".join(["{broken", *lines]) + "\n")
    with pytest.raises(StorageError, match="line 1"):
        Journal(tmp_path)


def test_what_stands_beside_q_is_kept_by_evaluation_and_old_journals_have_none(tmp_path):
    journal = Journal(tmp_path)
    suggest(journal, 1)
    journal.append("report", 1, q=0.5, forward_equivalents=10.0)
    journal.append("report", 1, q=0.4, forward_equivalents=20.0, metrics={"recall": 0.5})
    journal.append("ended", 1, status="finished", q=0.3, metrics={"recall": math.inf})
    record = Journal(tmp_path).records[1]
    assert record == journal.records[1]
    assert [point.metrics for point in record.curve] == [{}, {"recall": 0.5}]
    assert record.metrics == {"recall": math.inf}
    assert json.loads(json.dumps(record.as_json(), allow_nan=False))["metrics"] == {"recall": None}


def test_numbers_that_are_not_finite_survive_and_json_for_others_has_null(tmp_path):
    journal = Journal(tmp_path)
    suggest(journal, 1)
    journal.append("report", 1, q=float("inf"), forward_equivalents=10.0)
    journal.append("ended", 1, status="failed", error="boom", diverged=True)
    record = Journal(tmp_path).records[1]
    assert record.q == float("inf")
    assert (record.status, record.error, record.diverged) == ("failed", "boom", True)
    assert json.loads(json.dumps(record.as_json(), allow_nan=False))["q"] is None


def test_a_decision_to_prune_holds_after_a_kill_and_keeps_its_reason(tmp_path):
    journal = Journal(tmp_path)
    suggest(journal, 1)
    journal.append("started", 1)
    journal.append("pruning", 1, reason="rung at 25 %")
    journal.append("report", 1, q=0.5, forward_equivalents=10.0)
    assert Journal(tmp_path).records[1].ended
    journal.append("ended", 1, status="stopped")
    assert journal.records[1].status == "pruned"
    journal.append("ended", 1, status="pruned", error=None)
    assert Journal(tmp_path).records[1].error == "rung at 25 %"


def test_a_resumed_trial_replaces_the_evaluations_that_it_repeats(tmp_path):
    journal = Journal(tmp_path)
    suggest(journal, 1)
    for spent, q in ((100.0, 0.5), (200.0, 0.4), (100.0, 0.5), (201.0, 0.3)):
        journal.append("report", 1, q=q, forward_equivalents=spent)
    assert journal.records[1].curve == [Point(100.0, 0.5), Point(201.0, 0.3)]
