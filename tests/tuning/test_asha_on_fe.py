"""The replay of early stopping over recorded curves counts what a sweep would have spent."""

import pytest

from benchmarks.asha_on_fe import replay
from raysched.config.sweep import EarlyStoppingConfig
from raysched.tuning.records import Point, TrialRecord


def trial(number: int, q: float) -> TrialRecord:
    curve = [Point(250.0 * part, q + (4 - part)) for part in (1, 2, 3, 4)]
    return TrialRecord(number, status="finished", q=q, curve=curve)


def test_one_at_a_time_and_best_first_all_others_get_the_grace_period_only():
    trials = [trial(n, q=n / 10) for n in (1, 2, 3, 4)]
    spent, survivors = replay(trials, EarlyStoppingConfig(), 1000.0, concurrent=1)
    assert spent == pytest.approx(1000 + 3 * 250)
    assert [t.number for t in survivors] == [1]


def test_worst_first_nobody_is_stopped_and_all_is_spent():
    trials = [trial(n, q=-n / 10) for n in (1, 2, 3, 4)]
    spent, survivors = replay(trials, EarlyStoppingConfig(), 1000.0, concurrent=1)
    assert (spent, len(survivors)) == (4000, 4)


def test_two_at_a_time_are_judged_in_the_order_of_their_compute():
    trials = [trial(1, 0.1), trial(2, 0.9), trial(3, 0.8)]
    spent, survivors = replay(trials, EarlyStoppingConfig(), 1000.0, concurrent=2)
    assert [t.number for t in survivors] == [1]
    assert spent == 1000 + 250 + 250
