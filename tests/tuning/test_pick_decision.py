"""What a pick says: known cases, and how often it errs where the truth is known."""

from __future__ import annotations

import pytest

from benchmarks.pick_decision import planted, simulate
from raysched.tuning.pick_decision import Candidate, decide_pick
from raysched.tuning.records import TrialRecord
from raysched.tuning.verdict import Comparison

ROLLED = {"scheduled_sampling.max_step_offset": 2}


def candidate(number: int, gain: float, half: float, exposure: str = "scheduled_sampling"):
    settings = ROLLED if exposure == "scheduled_sampling" else {"exposure": exposure}
    record = TrialRecord(number, assignments=settings, status="finished", q=1 - gain)
    comparison = Comparison(number, gain, gain - half, gain + half)
    return Candidate(record, exposure == "scheduled_sampling", comparison)


def decide(*candidates: Candidate, seeds: int = 3):
    return decide_pick(candidates, num_seeds=seeds, metric="KID")


def test_a_clear_gain_by_rollouts_is_named_with_its_interval():
    found = decide(candidate(3, 0.2, 0.05), candidate(7, 0.01, 0.05))
    assert (found.winner, found.verdict.answer) == (3, "rollouts_pay")
    assert "trial 003 (max_step_offset=2) beats teacher forcing by 0.2 in KID [0.15, 0.25]" in (
        found.verdict.text
    )
    assert "3 fresh seeds; Holm's correction over 2 candidates" in found.verdict.text
    assert not found.verdict.indicative


def test_a_cheaper_method_that_wins_alone_is_named_and_rollouts_do_not_pay():
    found = decide(candidate(3, 0.01, 0.05), candidate(7, 0.2, 0.05, "input_perturbation"))
    assert (found.winner, found.verdict.answer) == (7, "rollouts_do_not_pay")
    assert found.verdict.text.startswith("rollouts do not pay here: the best of them, trial 003")
    assert "a cheaper method does: trial 007 (exposure=input_perturbation)" in found.verdict.text


def test_where_all_rollouts_lose_they_do_not_pay_and_nobody_wins():
    found = decide(candidate(3, -0.2, 0.05), candidate(4, -0.3, 0.05))
    assert (found.winner, found.verdict.answer) == (None, "rollouts_do_not_pay")
    assert "trial 003 (max_step_offset=2), is worse than teacher forcing by 0.2" in (
        found.verdict.text
    )


def test_in_doubt_there_is_no_clear_winner_and_a_reader_learns_what_could_have_been_shown():
    found = decide(candidate(3, 0.02, 0.05))
    assert (found.winner, found.verdict.answer) == (None, "no_clear_winner")
    assert "a gain below about 0.05 in KID could not be shown" in found.reasons[-1]


def test_another_method_alone_and_beside_rollouts():
    alone = decide(candidate(7, 0.2, 0.05, "mixflow"))
    assert alone.verdict.answer == "other_method_pays"
    both = decide(candidate(3, 0.2, 0.05), candidate(7, 0.15, 0.05, "mixflow"))
    assert both.verdict.answer == "rollouts_pay"
    assert "so does trial 007 (exposure=mixflow) by 0.15" in both.verdict.text


@pytest.mark.parametrize("seeds", [1, 2])
def test_with_fewer_than_three_seeds_the_answer_is_indicative(seeds):
    found = decide(candidate(3, 0.2, 0.05), seeds=seeds)
    assert found.verdict.indicative
    assert f"(indicative: {seeds} fresh seed" in found.verdict.text


@pytest.mark.slow
def test_equal_settings_have_no_clear_winner_in_nearly_all_repetitions():
    found = simulate(repetitions=100, num_seeds=3, margin=0.0, num_candidates=3)
    assert found["no_clear_winner"] >= 95


@pytest.mark.slow
def test_a_setting_that_is_better_by_a_known_margin_is_named_and_its_interval_holds_it():
    found = planted(repetitions=40)
    assert found["named"] >= 38
    assert found["covered"] >= 36
