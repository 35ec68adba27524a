"""Objectives against hand-computed values, hypervolume against brute force."""

import itertools
import math
import random
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState

from raysched.config.loading import load_mapping
from raysched.config.structure import Structure
from raysched.config.sweep import Dimension, ObjectiveConfig, SearchConfig
from raysched.tuning.display import front_of, objective_text
from raysched.tuning.journal import Journal
from raysched.tuning.measuring import measure_trials, pareto_summary, unreported
from raysched.tuning.objectives import sweep_objectives
from raysched.tuning.pareto import dominates, hypervolume, non_dominated, ranks
from raysched.tuning.proposals import Proposals
from raysched.tuning.records import Point, TrialRecord

F = 800.0
BASE = load_mapping({}, "b").config


def objectives(**config):
    return sweep_objectives(ObjectiveConfig(**config), BASE, F)


def finished(curve, number=1, **fields):
    record = TrialRecord(number, **fields)
    for spent, q in curve:
        record.add_point(Point(spent, q))
    record.status = "finished"
    return record


# An evaluation comes a step after its mark: 200, 400, 600, 800.
CURVE = [(203.0, 0.8), (401.0, 0.5), (604.0, 0.6), (802.0, 0.4)]


def only(found):
    (measured,) = found.values()
    return measured.value, measured.censored


def test_quality_is_that_at_the_budget():
    assert only(objectives().measured(finished(CURVE))) == (0.4, False)


def test_the_area_holds_the_best_so_far_from_mark_to_mark_over_the_logarithm():
    # 0.8 from 200 to 400, 0.5 from 400 to 800 (0.6 is no improvement).
    by_hand = (0.8 * math.log(2) + 0.5 * math.log(2)) / math.log(4)
    area = objectives(name="area")
    assert only(area.measured(finished(CURVE)))[0] == pytest.approx(by_hand)
    assert area.losses_at(finished(CURVE[:1]).curve) == (0.8,)
    middle = area.losses_at(finished(CURVE[:3]).curve)
    expected = (0.8 * math.log(2) + 0.5 * math.log(1.5)) / math.log(3)
    assert middle == (pytest.approx(expected),)


def test_a_first_q_that_is_no_number_makes_the_area_infinite_and_a_later_one_nothing():
    area = objectives(name="area")
    late = [CURVE[0], CURVE[1], (604.0, math.nan), CURVE[3]]
    assert area.measured(finished(late)) == area.measured(finished(CURVE))
    assert only(area.measured(finished([(203.0, math.nan), *CURVE[1:]])))[0] == math.inf


@pytest.mark.parametrize(
    ("target", "expected"),
    [(0.8, (203.0, False)), (0.55, (401.0, False)), (0.4, (802.0, False)), (0.2, (1600.0, True))],
)
def test_the_cost_is_where_the_target_is_first_reached_or_the_stretched_budget(target, expected):
    cost = objectives(name="cost_to_target", target=target)
    value, censored = only(cost.measured(finished(CURVE)))
    assert (value, censored) == (pytest.approx(expected[0]), expected[1])


def test_a_negative_target_stretches_by_its_size():
    cost = objectives(name="cost_to_target", target=-0.1)
    assert only(cost.measured(finished(CURVE))) == (pytest.approx(F * (1 + 0.5 / 0.1)), True)


def test_the_gain_is_paired_by_seed_and_its_loss_needs_no_baseline():
    gain = objectives(name="gain_over_baseline")
    own, base = finished(CURVE), finished([(802.0, 0.7)], number=0, baseline=True)
    own.further_curves = [[Point(803.0, 0.1)]]
    base.further_curves = [[Point(801.0, 0.9)]]
    assert only(gain.measured(own, base))[0] == pytest.approx(((0.7 - 0.4) + (0.9 - 0.1)) / 2)
    assert gain.measured(own) == {}
    assert gain.losses(own) == (pytest.approx(0.25),)
    assert only(gain.measured(base, base))[0] == 0


def test_the_mean_over_seeds_is_of_each_seeds_own_objective():
    cost = objectives(name="cost_to_target", target=0.55)
    record = finished(CURVE)
    record.further_curves = [[Point(200.0, 0.5)]]
    assert only(cost.measured(record)) == (300.5, False)


def beside(**metrics):
    record = TrialRecord(1, status="finished")
    record.add_point(Point(F, 0.5, metrics))
    return record


def test_several_objectives_come_from_one_evaluation_and_lower_is_better_for_all_losses():
    several = objectives(several=("quality", "nfe", "diversity"), target=0.3)
    record = beside(**{"coverage": 0.9, "kid/nfe_5": 0.6, "kid/nfe_10": 0.3, "kid/nfe_20": 0.2})
    assert several.losses(record) == (0.5, 10.0, -0.9)
    assert {n: m.value for n, m in several.measured(record).items()}["diversity"] == 0.9
    never = objectives(several=("quality", "nfe"), target=0.1).measured(record)["nfe"]
    assert (never.value, never.censored) == (pytest.approx(40.0), True)
    assert several.losses(beside(coverage=0.9)) is None


@pytest.mark.parametrize("status", ["running", "pruned", "failed", "stopped"])
def test_a_trial_that_did_not_reach_its_budget_has_no_objectives(status):
    record = finished(CURVE)
    record.status = status
    assert objectives().measured(record) == {}
    assert objectives().losses(record) is None


def brute_volume(points, corner):
    """Inclusion and exclusion over all subsets of boxes."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in itertools.combinations(points, size):
            edges = [max(0.0, c - max(p[i] for p in chosen)) for i, c in enumerate(corner)]
            total += (-1) ** (size + 1) * math.prod(edges)
    return total


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 4])
def test_ranks_and_hypervolume_agree_with_brute_force(num_objectives):
    generator = random.Random(num_objectives)
    for _ in range(15):
        # Coarse values, so that ties and equal points happen.
        points = [
            tuple(generator.randint(0, 6) / 4 for _ in range(num_objectives)) for _ in range(8)
        ]
        corner = (1.3,) * num_objectives
        inside = [p for p in points if all(a < b for a, b in zip(p, corner, strict=True))]
        assert hypervolume(points, corner) == pytest.approx(brute_volume(inside, corner))
        front = [not any(dominates(b, a) for b in points) for a in points]
        assert list(non_dominated(points)) == front
        found = ranks(points)
        for rank, a in zip(found, points, strict=True):
            above = [r for r, b in zip(found, points, strict=True) if dominates(b, a)]
            assert rank == (max(above) + 1 if above else 0)
    assert hypervolume([], corner) == 0


def test_the_journal_keeps_objectives_and_gains_come_when_the_baseline_is_done(tmp_path):
    journal = Journal(tmp_path)
    gain = objectives(name="gain_over_baseline")
    for number in (0, 1):
        journal.append("suggested", number, baseline=number == 0, assignments={})
    journal.append("ended", 1, status="finished", q=0.2, forward_equivalents=F)
    measure_trials(journal, gain)
    assert journal.records[1].objectives == {}
    # The baseline may be the last to end: until then nothing is missing.
    assert unreported(gain, journal.ordered()) is None
    journal.append("ended", 0, status="finished", q=0.5, forward_equivalents=F)
    measure_trials(journal, gain)
    measure_trials(journal, gain)
    assert Journal(tmp_path).records[1].objectives == {"gain_over_baseline": pytest.approx(0.3)}
    assert journal.path.read_text().count('"measured"') == 2
    assert unreported(gain, journal.ordered()) is None


def test_the_front_and_its_volume_are_summed_up_in_the_users_directions():
    several = objectives(
        several=("quality", "diversity"), reference={"quality": 1, "diversity": 0}
    )
    trials = []
    for number, (q, coverage) in enumerate([(0.5, 0.5), (0.4, 0.4), (0.6, 0.4)]):
        record = TrialRecord(number, baseline=number == 0, status="finished")
        record.add_point(Point(F, q, {"coverage": coverage}))
        record.objectives = {"quality": q, "diversity": coverage}
        trials.append(record)
    summary = pareto_summary(several, trials)
    assert summary["front"] == [0, 1]
    assert summary["hypervolume"] == pytest.approx(0.5 * 0.5 + 0.1 * 0.4)
    assert summary["hypervolume_baseline"] == pytest.approx(0.25)
    assert summary["reference"] == {"quality": 1, "diversity": 0}
    assert front_of(trials, ["quality", "diversity"]) == {0, 1}
    assert pareto_summary(objectives(), trials) is None


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("reference", [{}, {"quality": 1, "diversity": 0}])
def test_a_trial_without_finite_objectives_is_left_out_of_the_front_and_the_volume(odd, reference):
    several = objectives(several=("quality", "diversity"), reference=reference)
    trials = []
    for number, (q, coverage) in enumerate([(0.5, 0.5), (0.4, 0.4), (0.6, 0.4), (odd, 0.9)]):
        record = TrialRecord(number, baseline=number == 0, status="finished")
        record.add_point(Point(F, q, {"coverage": coverage}))
        record.objectives = {"quality": q, "diversity": coverage}
        trials.append(record)
    assert pareto_summary(several, trials) == pareto_summary(several, trials[:3])
    assert front_of(trials, ["quality", "diversity"]) == {0, 1}
    trials[0].curve[-1] = Point(F, odd, {"coverage": 0.5})
    alone = pareto_summary(several, trials)
    assert alone["hypervolume_baseline"] == 0
    assert math.isfinite(alone["hypervolume"])
    assert all(map(math.isfinite, alone["reference"].values()))


def test_a_target_that_was_never_reached_is_shown_as_such():
    record = TrialRecord(1, objectives={"cost_to_target": 92160.0}, censored=["cost_to_target"])
    assert objective_text(record, "cost_to_target") == "never (92,160)"


@pytest.mark.parametrize("algorithm", ["tpe", "random", "quasi_random", "gp", "nsga2"])
def test_every_sampler_learns_several_losses_and_a_pruned_trial_has_none(algorithm):
    space = {"a": Dimension(uniform=(0.0, 1.0)), "b": Dimension(choice=(1, 2))}
    search = SearchConfig(algorithm=algorithm, num_samples=12, startup_trials=3)
    proposals = Proposals(space, search, losses=lambda r: (r.q, 1 - r.q), num_losses=2)
    for number in range(1, 11):
        settings = proposals.ask(number)
        status = "pruned" if number == 4 else "finished"
        q = math.nan if number == 6 else settings["a"]
        record = TrialRecord(number, assignments=settings, status=status, q=q)
        record.curve = [Point(10.0, 0.5)]
        proposals.tell(record)
    states = [t.state for t in proposals.study.trials]
    assert states.count(TrialState.PRUNED) == 1
    assert states.count(TrialState.COMPLETE) == 9
    pruned = next(t for t in proposals.study.trials if t.state is TrialState.PRUNED)
    assert pruned.values is None
    assert all(math.isfinite(v) for t in proposals.study.trials for v in t.values or ())


@pytest.mark.parametrize("algorithm", ["tpe", "random", "quasi_random", "nsga2"])
def test_inactive_settings_are_not_asked_for_and_do_not_tell_trials_apart(algorithm):
    space = {
        "m": Dimension(choice=("x", "y")),
        "p": Dimension(quniform=(0.0, 0.3, 0.1), when={"m": "x"}),
    }
    structure = Structure(space, {})
    search = SearchConfig(algorithm=algorithm, num_samples=9)
    proposals = Proposals(structure, search)
    drawn = []
    for number in range(1, 7):
        settings = proposals.ask(number)
        if settings is None:
            break
        drawn.append(settings)
        proposals.tell(TrialRecord(number, assignments=settings, status="finished", q=0.1))
    assert sum(settings == {"m": "y"} for settings in drawn) == 1
    assert {s["p"] for s in drawn if "p" in s} <= {0.0, 0.1, 0.2, 0.3}
    assert len(drawn) == 5
    params = [set(t.params) for t in proposals.study.trials if t.state is TrialState.COMPLETE]
    assert {"m"} in params
    again = Proposals(
        structure,
        search,
        past=[
            TrialRecord(n, assignments=s, status="finished", q=0.1)
            for n, s in enumerate(drawn, start=1)
        ],
    )
    assert again.ask(6) is None


def test_sobol_points_fill_the_space_evenly_and_a_resumed_search_goes_on():
    space = {"a": Dimension(uniform=(0.0, 1.0)), "b": Dimension(choice=(1, 2, 3, 4))}
    search = SearchConfig(algorithm="quasi_random")
    proposals = Proposals(space, search)
    drawn = [proposals.ask(number) for number in range(1, 17)]
    assert sorted(int(16 * s["a"]) for s in drawn) == list(range(16))
    assert sorted(s["b"] for s in drawn) == sorted([1, 2, 3, 4] * 4)
    past = [SimpleNamespace(baseline=False, assignments=s, ended=False) for s in drawn[:5]]
    resumed = Proposals(space, search, past=past)
    assert [resumed.ask(n) for n in range(6, 17)] == drawn[5:]
