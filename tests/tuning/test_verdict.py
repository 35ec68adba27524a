import random

import pytest

from raysched.config.loading import load_mapping
from raysched.config.sweep import ObjectiveConfig
from raysched.tuning.objectives import sweep_objectives
from raysched.tuning.records import Point, TrialRecord
from raysched.tuning.verdict import Comparison, best, decide, eligible, holm, ranked


def trial(number: int, q: float | None, status: str = "finished") -> TrialRecord:
    settings = {} if number == 0 else {"scheduled_sampling.max_step_offset": number}
    return TrialRecord(number, baseline=number == 0, assignments=settings, status=status, q=q)


def verdict(baseline_q: float, gains: dict[int, tuple[float, float]], seeds: int = 1):
    trials = [trial(0, baseline_q), *(trial(n, baseline_q - g) for n, (g, _) in gains.items())]
    comparisons = [Comparison(n, g, g - half, g + half) for n, (g, half) in gains.items()]
    return decide(trials, comparisons, num_seeds=seeds, metric="KID")


def test_a_clear_gain_names_the_winner_with_its_interval():
    found = verdict(0.5, {1: (0.02, 0.05), 3: (0.2, 0.05)})
    assert found.answer == "rollouts_pay"
    assert (found.difference, found.num_compared, found.indicative) == (0.2, 2, True)
    assert "trial 003 (max_step_offset=3) beats teacher forcing by 0.2 in KID" in found.text
    assert "[0.15, 0.25]" in found.text
    assert "(indicative: 1 seed" in found.text
    assert "Holm" in found.text


def test_when_even_the_best_is_worse_rollouts_do_not_pay():
    found = verdict(0.5, {1: (-0.2, 0.05), 2: (-0.4, 0.05)})
    assert found.answer == "rollouts_do_not_pay"
    assert found.text.startswith("rollouts do not pay here: the best of them, trial 001")
    assert "by 0.2 in KID [0.15, 0.25]" in found.text
    assert found.difference == -0.2


def test_where_the_method_is_searched_the_verdict_is_about_methods_and_what_they_use():
    settings = {"exposure": "mixflow", "mixflow.gamma": 0.8, "dream.power": 1.0}
    mixed = TrialRecord(1, assignments=settings, status="finished", q=0.7)
    loss = Comparison(1, -0.2, -0.25, -0.15)
    found = decide([trial(0, 0.5), mixed], [loss], num_seeds=1, metric="KID")
    assert found.text.startswith(
        "the methods tried do not pay here: the best of them, trial 001 "
        "(exposure=mixflow, gamma=0.8), is worse"
    )


def test_an_interval_around_zero_is_no_clear_winner_and_reads_as_better_or_worse():
    better, worse = verdict(0.5, {1: (0.02, 0.05)}), verdict(0.5, {1: (-0.02, 0.05)})
    assert better.answer == worse.answer == "no_clear_winner"
    assert "better than teacher forcing by 0.02 in KID [-0.03, 0.07]" in better.text
    assert "worse than teacher forcing by 0.02 in KID [-0.03, 0.07]" in worse.text
    assert better.text.startswith("no clear winner")


def test_what_would_win_alone_may_not_win_among_many():
    alone = verdict(0.5, {1: (0.06, 0.05)})
    crowd = {n: (0.0001 * n, 0.05) for n in range(2, 12)}
    among = verdict(0.5, {1: (0.06, 0.05), **crowd})
    assert alone.answer == "rollouts_pay"
    assert among.answer == "no_clear_winner"
    assert among.p_value == pytest.approx(11 * alone.p_value)


def test_without_a_candidate_at_the_budget_nothing_is_claimed():
    trials = [trial(0, 0.5), trial(1, 0.1, "pruned"), trial(2, None, "failed")]
    found = decide(trials, [], num_seeds=1, metric="KID")
    assert found.answer == "no_clear_winner"
    assert found.difference is None
    assert "no candidate reached the budget" in found.text


def test_only_trials_at_the_budget_with_a_finite_quality_compete():
    trials = [
        trial(0, 0.5),
        trial(1, 0.1, "pruned"),
        trial(2, float("nan")),
        trial(3, 0.4),
        trial(4, 0.2, "failed"),
    ]
    assert [t.number for t in eligible(trials)] == [0, 3]
    assert best(trials).number == 3
    assert best([trial(0, 0.4), trial(3, 0.4)]).baseline
    assert best([]) is None


def test_holm_agrees_with_a_worked_example():
    # Sorted 0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1, then made monotone.
    adjusted = holm({1: 0.04, 2: 0.01, 3: 0.03, 4: 0.02})
    assert adjusted == pytest.approx({2: 0.04, 4: 0.06, 3: 0.06, 1: 0.06})
    assert holm({1: 0.9, 2: 0.8}) == pytest.approx({2: 1.0, 1: 1.0})


def test_equal_candidates_are_called_clear_winners_in_at_most_one_of_twenty():
    rng = random.Random(0)
    errors = 0
    for _ in range(400):
        # Seven candidates that all equal the baseline, each measured with unit error.
        gains = {n: (rng.gauss(0, 1), 1.96) for n in range(1, 8)}
        errors += verdict(0.0, gains).answer == "rollouts_pay"
    assert errors <= 24


def test_a_known_gain_of_four_standard_errors_is_found():
    rng = random.Random(1)
    found = 0
    for _ in range(200):
        gains = {n: (rng.gauss(4.5 if n == 3 else 0, 1), 1.96) for n in range(1, 8)}
        found += verdict(0.0, gains).answer == "rollouts_pay"
    assert found >= 180


def test_an_interval_without_width_is_certain():
    assert Comparison(1, 0.1, 0.1, 0.1).p_value == 0.0
    assert Comparison(1, 0.0, 0.0, 0.0).p_value == 1.0


def test_a_winner_that_does_not_roll_out_is_no_case_for_rollouts():
    other = TrialRecord(1, assignments={"exposure": "mixflow"}, status="finished", q=0.3)
    gain = Comparison(1, 0.2, 0.15, 0.25)
    found = decide(
        [trial(0, 0.5), other], [gain], num_seeds=1, metric="KID", rolls_out=lambda _: False
    )
    assert found.answer == "other_method_pays"
    assert "beats teacher forcing by 0.2" in found.text


F = 1000.0


def asked(**config):
    return sweep_objectives(ObjectiveConfig(**config), load_mapping({}, "b").config, F)


def curved(number: int, *curve: float, **beside: float) -> TrialRecord:
    """A finished trial with evenly spaced evaluations, the last at the budget."""
    found = trial(number, None)
    for place, q in enumerate(curve, start=1):
        found.add_point(Point(F * place / len(curve), q, beside))
    return found


COST = asked(name="cost_to_target", target=0.3)
# Trial 1 is soon at the target, trial 2 ends lower, trial 3 gets there at the end.
CURVES = [curved(1, 0.9, 0.3, 0.3, 0.29), curved(2, 0.9, 0.8, 0.3, 0.1), curved(3, 1, 1, 1, 0.2)]


def test_the_best_is_whom_the_objective_says_and_without_one_that_of_lowest_q():
    assert [t.number for t in ranked(CURVES, COST)] == [1, 2, 3]
    assert [t.number for t in ranked(CURVES)] == [2, 3, 1]
    assert [t.number for t in ranked(CURVES, asked())] == [2, 3, 1]
    assert [t.number for t in ranked(CURVES, asked(name="gain_over_baseline"))] == [2, 3, 1]
    assert [t.number for t in ranked(CURVES, asked(name="area"))] == [1, 2, 3]


def test_of_several_objectives_the_front_comes_first_and_in_it_the_lowest_q():
    both = asked(several=("quality", "diversity"))
    trials = [
        curved(1, 0.1, coverage=0.2),
        curved(2, 0.2, coverage=0.1),  # beaten by trial 1 in both
        curved(3, 0.5, coverage=0.9),
        curved(4, 0.15),  # it lacks the second
    ]
    assert [t.number for t in ranked(trials, both)] == [1, 3, 2, 4]


def test_the_verdict_is_about_the_best_by_the_objective():
    gains = {1: 0.1, 2: 0.3, 3: 0.2}
    comparisons = [Comparison(n, gain, gain - 0.05, gain + 0.05) for n, gain in gains.items()]
    trials = [trial(0, 0.4), *CURVES]
    found = decide(trials, comparisons, num_seeds=1, metric="KID", objectives=COST)
    assert (found.answer, found.candidate, found.difference) == ("rollouts_pay", 1, 0.1)
    assert "(max_step_offset=1; best by cost_to_target) beats teacher forcing" in found.text
    by_q = decide(trials, comparisons, num_seeds=1, metric="KID", objectives=asked())
    assert (by_q.candidate, by_q.difference) == (2, 0.3)


def test_rollouts_do_not_pay_only_where_the_candidate_of_lowest_q_is_worse_too():
    trials = [trial(0, 0.2), *CURVES]

    def found(lowest):
        gains = {1: -0.09, 2: lowest, 3: -0.08}
        comparisons = [Comparison(n, g, g - 0.05, g + 0.05) for n, g in gains.items()]
        return decide(trials, comparisons, num_seeds=1, metric="KID", objectives=COST)

    assert (found(0.1).answer, found(0.1).candidate) == ("no_clear_winner", 1)
    assert (
        "[0.04, 0.14] at equal compute, while another candidate has a lower q" in found(0.1).text
    )
    assert (found(-0.07).answer, found(-0.07).candidate) == ("rollouts_do_not_pay", 2)
