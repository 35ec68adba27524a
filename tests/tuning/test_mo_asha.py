"""MO-ASHA against brute force, and what a pruned trial tells a searcher of several objectives."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.mo_asha import PROBLEMS, search
from raysched.config.sweep import EarlyStoppingConfig
from raysched.tuning.mo_asha import ParetoHalving, best_first
from raysched.tuning.pareto import dominates, ranks
from raysched.tuning.records import FORWARD_EQUIVALENTS, METRICS, OBJECTIVE, Point, TrialRecord
from raysched.tuning.rules import Halving, Median
from raysched.tuning.scheduler import ComputeHalving


def brute_fronts(points):
    left, fronts = set(range(len(points))), []
    while left:
        front = {
            i for i in left if not any(dominates(points[j], points[i]) for j in left if j != i)
        }
        fronts.append(front)
        left -= front
    return fronts


def brute_net(points, members):
    """The epsilon-net of a front, by comparing all pairs anew for every place."""
    columns = list(zip(*(points[i] for i in members), strict=True))
    low, width = [min(c) for c in columns], [(max(c) - min(c)) or 1.0 for c in columns]
    at = {i: [(v - a) / w for v, a, w in zip(points[i], low, width, strict=True)] for i in members}
    order = [min(members, key=lambda i: (math.fsum(v * v for v in at[i]), i))]
    while len(order) < len(members):
        left = [i for i in members if i not in order]
        order.append(max(left, key=lambda i: (min(math.dist(at[i], at[j]) for j in order), -i)))
    return order


@pytest.mark.parametrize("num_objectives", [1, 2, 3])
def test_trials_are_ordered_as_by_brute_force(num_objectives):
    rng = random.Random(num_objectives)
    for size in (1, 2, 5, 17, 30):
        points = [[rng.random() for _ in range(num_objectives)] for _ in range(size)]
        expected = [i for f in brute_fronts(points) for i in brute_net(points, sorted(f))]
        assert best_first(points) == expected


@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_whom_a_rung_stops_is_whom_brute_force_would_on_random_surfaces(factor):
    rng = random.Random(4)
    halving = ParetoHalving(grace=100, budget=900, factor=factor)
    entered: dict[float, list] = {m: [] for m in halving.milestones}
    stopped = 0
    for number in range(60):
        for milestone in halving.milestones:
            values = (rng.random(), rng.random())
            stops = halving.stops(number, milestone, values)
            entered[milestone].append(values)
            points = entered[milestone]
            order = [i for f in brute_fronts(points) for i in brute_net(points, sorted(f))]
            goes_on = order[: math.ceil(len(points) / factor)]
            assert stops == (len(points) - 1 not in goes_on)
            if stops:
                stopped += 1
                break
    assert 25 < stopped < 60


def test_rungs_lie_below_the_budget_and_a_trial_is_judged_once_at_each():
    halving = ParetoHalving(grace=250, budget=1000, factor=2)
    assert halving.milestones == [250, 500]
    assert not halving.stops(1, 250, (0.0, 0.0))
    assert halving.stops(2, 260, (1.0, 1.0))
    assert not halving.stops(2, 270, (9.0, 9.0))
    assert not halving.stops(3, 100, (9.0, 9.0))


def losses(curve):
    return (curve[-1].q, -curve[-1].metrics["coverage"])


def scheduler(pruned):
    return ComputeHalving(
        EarlyStoppingConfig(kind="mo_asha"), budget=1000.0, losses=losses,
        prune=lambda *call: pruned.append(call),
    )  # fmt: skip


class Trial:
    def __init__(self, number):
        self.config = {"trial_number": number, "baseline": False}


def report(q, coverage):
    metrics = {"coverage": coverage}
    return {FORWARD_EQUIVALENTS: 250.0, OBJECTIVE: q, METRICS: metrics, "run_dir": ""}


def test_a_resumed_sweep_prunes_by_the_rungs_of_the_earlier_session():
    straight, resumed = [], []
    whole = scheduler(straight)
    cases = [(1, 0.1, 0.5), (2, 0.5, 0.9), (3, 0.6, 0.4), (4, 0.7, 0.3)]
    for number, q, coverage in cases:
        whole.on_trial_result(None, Trial(number), report(q, coverage))
    # 2 is on the front of both, but the best half of two is one.
    assert [call[0] for call in straight] == [2, 3, 4]
    second = scheduler(resumed)
    second.replay(
        TrialRecord(n, status="finished", curve=[Point(250.0, q, {"coverage": c})])
        for n, q, c in cases[:3]
    )
    assert resumed == []
    second.on_trial_result(None, Trial(4), report(0.7, 0.3))
    assert [call[0] for call in resumed] == [4]
    assert "non-dominated rank" in resumed[0][2]


def test_hyperbands_brackets_follow_from_the_number_and_the_last_stops_nobody():
    early = EarlyStoppingConfig(kind="hyperband", brackets=3)
    rule = Halving(early, 1000.0, brackets=3)
    brackets = [rule.bracket_of(n) for n in range(200)]
    assert brackets == [Halving(early, 1000.0, brackets=3).bracket_of(n) for n in range(200)]
    counts = [brackets.count(b) for b in range(3)]
    assert counts == sorted(counts, reverse=True)
    assert min(counts) > 0
    first_stop = {}
    for milestone in (250.0, 500.0, 750.0):
        for n in range(200):
            if rule.stops(n, milestone, (float(n),)):
                first_stop.setdefault(brackets[n], milestone)
    # Three rungs at 25, 50 and 100 % of the budget; those at the budget decide nothing.
    assert first_stop == {0: 250.0, 1: 500.0}


def test_the_median_rule_stops_who_is_worse_than_the_others_median_average():
    rule = Median(EarlyStoppingConfig(kind="median", min_trials=3), 1000.0)
    for number, q in ((1, 0.1), (2, 0.2), (3, 0.3)):
        assert not rule.stops(number, 250.0, (q,))
    assert not rule.stops(4, 250.0, (0.15,))
    assert rule.stops(5, 250.0, (0.9,))
    assert not rule.stops(5, 500.0, (0.9,))
    # Before the grace period nobody is.
    assert not rule.stops(6, 100.0, (9.0,))


def test_being_stopped_early_earns_no_reward_where_compute_is_an_objective():
    """A trap: half of the space is bad, and cheap only because it would be stopped early."""
    right = search(PROBLEMS["trap"], seed=0, prune=True, budget=12.0, told="fail")
    wrong = search(PROBLEMS["trap"], seed=0, prune=True, budget=12.0, told="rung")
    assert len(right.proposals) > 2 * len(right.complete)
    # The searcher breeds from its front: nobody may stand there for having been stopped.
    assert right.stopped_on_front == 0
    assert wrong.stopped_on_front > 0


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, 2.0, math.inf])] * 2), max_size=8))
def test_infinite_objectives_have_a_rank_like_any_other(points):
    found = {i: rank for rank, front in enumerate(brute_fronts(points)) for i in front}
    rows = np.array(points, dtype=float).reshape(-1, 2)
    assert ranks(rows) == [found[i] for i in range(len(points))]
