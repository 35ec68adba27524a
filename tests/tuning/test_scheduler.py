import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from raysched.config.sweep import EarlyStoppingConfig
from raysched.training.stop import request_stop
from raysched.tuning.records import FORWARD_EQUIVALENTS, OBJECTIVE, Point, TrialRecord
from raysched.tuning.scheduler import ComputeHalving

BUDGET = 1000.0


@dataclass
class Trial:
    number: int
    baseline: bool = False
    config: dict = field(init=False)
    trial_id: str = field(init=False)

    def __post_init__(self):
        self.config = {"trial_number": self.number, "baseline": self.baseline}
        self.trial_id = f"ray-{self.number}"


def report(spent: float, q: float, **more) -> dict:
    return {FORWARD_EQUIVALENTS: spent, OBJECTIVE: q, "run_dir": "", "ended": False, **more}


def halving(pruned: list, **config) -> ComputeHalving:
    settings = EarlyStoppingConfig(**config)
    return ComputeHalving(
        settings, budget=BUDGET, prune=lambda *call: pruned.append(call), interval=250.0
    )


@pytest.mark.parametrize("factor", [2.0, 3.0, 4.0])
def test_it_prunes_whom_plain_asha_stops_on_random_curves(factor):
    rng = random.Random(0)
    pruned: list = []
    ours = halving(pruned, grace_fraction=0.1, reduction_factor=factor)
    plain = AsyncHyperBandScheduler(
        time_attr=FORWARD_EQUIVALENTS,
        metric=OBJECTIVE,
        mode="min",
        max_t=BUDGET,
        grace_period=100.0,
        reduction_factor=factor,
        stop_last_trials=False,
    )
    stopped = set()
    trials = [Trial(n) for n in range(1, 31)]
    for trial in trials:
        ours.on_trial_add(None, trial)
        plain.on_trial_add(None, trial)
    for spent in range(100, 1000, 100):
        for trial in trials:
            if trial.number in stopped:
                continue
            result = report(float(spent), rng.random() / spent)
            if plain.on_trial_result(None, trial, result) == TrialScheduler.STOP:
                stopped.add(trial.number)
            assert ours.on_trial_result(None, trial, result) == TrialScheduler.CONTINUE
    assert {number for number, _, _ in pruned} == stopped
    assert 10 < len(stopped) < 30


def test_the_baseline_is_neither_pruned_nor_a_competitor():
    pruned: list = []
    scheduler = halving(pruned)
    baseline, first, second = Trial(0, baseline=True), Trial(1), Trial(2)
    for trial in (baseline, first, second):
        scheduler.on_trial_add(None, trial)
    scheduler.on_trial_result(None, first, report(250.0, 0.5))
    scheduler.on_trial_result(None, baseline, report(250.0, 9.0))
    scheduler.on_trial_result(None, second, report(250.0, 0.6))
    # Were the baseline's 9.0 in the rung, 0.6 would be in its better half.
    assert [number for number, _, _ in pruned] == [2]


def test_nobody_is_pruned_at_the_budget_or_by_a_last_report_or_by_odd_numbers():
    pruned: list = []
    scheduler = halving(pruned)
    for trial in (good := Trial(1), bad := Trial(2)):
        scheduler.on_trial_add(None, trial)
    for spent in (250.0, 500.0, 1000.0):
        scheduler.on_trial_result(None, good, report(spent, 0.1))
    scheduler.on_trial_result(None, bad, report(1000.0, 0.9))
    scheduler.on_trial_result(None, bad, report(500.0, 0.9, ended=True))
    scheduler.on_trial_result(None, bad, report(500.0, float("nan")))
    scheduler.on_trial_result(None, bad, report(100.0, 0.9))
    assert pruned == []


def test_a_pruned_trial_is_asked_once_with_a_reason_that_names_the_rung():
    pruned: list = []
    scheduler = halving(pruned)
    for trial in (good := Trial(1), bad := Trial(2)):
        scheduler.on_trial_add(None, trial)
    scheduler.on_trial_result(None, good, report(250.0, 0.1))
    scheduler.on_trial_result(None, bad, report(250.0, 0.9, run_dir="/runs/2"))
    scheduler.on_trial_result(None, bad, report(500.0, 0.9))
    assert len(pruned) == 1
    number, run_dir, reason = pruned[0]
    assert (number, run_dir) == (2, "/runs/2")
    assert "rung at 25 %" in reason
    assert "0.9" in reason


def test_a_resumed_sweep_prunes_by_the_rungs_of_the_earlier_session():
    pruned: list = []
    scheduler = halving(pruned)
    earlier = TrialRecord(1, status="finished", curve=[Point(250.0, 0.1), Point(500.0, 0.05)])
    gone = TrialRecord(2, status="pruned", curve=[Point(250.0, 0.9)])
    scheduler.replay([TrialRecord(0, baseline=True), earlier, gone])
    assert pruned == []
    scheduler.on_trial_add(None, new := Trial(3))
    scheduler.on_trial_result(None, new, report(250.0, 0.6))
    assert [number for number, _, _ in pruned] == [3]


def test_the_median_rule_compares_at_the_marks_of_evaluations_however_late_they_come():
    pruned: list = []
    scheduler = halving(pruned, kind="median", grace_fraction=0.25, min_trials=3)
    late = {1: 12.0, 2: 60.0, 3: 25.0, 4: 40.0, 5: 1.0}
    for number in (1, 2, 3):
        scheduler.on_trial_result(None, Trial(number), report(250.0 + late[number], 0.1))
    # Whether its own step is longer or shorter than theirs, it is worse at the same mark.
    for number, q in ((4, 0.05), (5, 0.9)):
        scheduler.on_trial_result(None, Trial(number), report(250.0 + late[number], q))
    assert [number for number, _, _ in pruned] == [5]
    scheduler.on_trial_result(None, Trial(6), report(330.0, 0.9))
    assert [number for number, _, _ in pruned] == [5, 6]
    # At the next mark their values there count too: averages of 0.3, not of 0.1.
    for number in (1, 2, 3):
        scheduler.on_trial_result(None, Trial(number), report(500.0 + late[number], 0.5))
    scheduler.on_trial_result(None, Trial(7), report(501.0, 0.2))
    assert [number for number, _, _ in pruned] == [5, 6]


def test_a_resumed_trial_is_judged_by_the_median_whatever_the_order_of_the_replay():
    pruned: list = []
    scheduler = halving(pruned, kind="median", grace_fraction=0.25, min_trials=3)
    ended = [
        TrialRecord(n, status="finished", curve=[Point(250.0, 0.1), Point(500.0, 0.1)])
        for n in (1, 2, 3)
    ]
    # When it was evaluated, nobody else had been.
    running = TrialRecord(4, status="running", curve=[Point(250.0, 0.9)])
    scheduler.replay([*ended, running])
    assert pruned == []
    scheduler.on_trial_result(None, Trial(4), report(500.0, 0.8))
    assert [number for number, _, _ in pruned] == [4]


def test_the_request_is_a_file_that_the_loop_understands(tmp_path: Path):
    def prune(number: int, run_dir: str, reason: str) -> None:
        request_stop(Path(run_dir), "pruned", reason)

    scheduler = ComputeHalving(EarlyStoppingConfig(), budget=BUDGET, prune=prune)
    for trial in (good := Trial(1), bad := Trial(2)):
        scheduler.on_trial_add(None, trial)
    scheduler.on_trial_result(None, good, report(250.0, 0.1))
    scheduler.on_trial_result(None, bad, report(250.0, 0.9, run_dir=str(tmp_path)))
    content = json.loads((tmp_path / ".stop").read_text())
    assert content["status"] == "pruned"
    assert "rung" in content["reason"]


def test_a_sweep_prunes_by_its_objective_and_says_so(tmp_path):
    from raysched.tuning.journal import Journal
    from raysched.tuning.objectives import sweep_objectives
    from raysched.tuning.search import make_scheduler
    from raysched.tuning.trial import TrialPlan
    from tests.tuning.synthetic import load

    loaded = load(tmp_path, objective={"name": "cost_to_target", "target": 0.3})
    journal = Journal(tmp_path)
    for number in (1, 2, 3):
        journal.append("suggested", number, baseline=False, assignments={})
    plan = TrialPlan({}, tmp_path, BUDGET, (0,), None, train=None)
    asked = sweep_objectives(loaded.sweep.objective, loaded.base.config, BUDGET)
    scheduler = make_scheduler(loaded, journal, plan, asked)
    curves = {1: (0.9, 0.4, 0.35), 2: (0.3, 0.5, 0.5)}
    for place, spent in enumerate((100.0, 200.0, 260.0)):
        for number, curve in curves.items():
            result = report(spent, curve[place], run_dir=str(tmp_path / f"{number}"))
            scheduler.on_trial_result(None, Trial(number), result)
    # Trial 2 was at the target once; that its q is the worse one now is not asked.
    assert journal.records[2].error is None
    scheduler.on_trial_result(None, Trial(3), report(260.0, 0.31, run_dir=str(tmp_path / "3")))
    assert journal.records[3].error == (
        "rung at 26 % of the budget: q 0.31 was not in the best 1/2 by cost_to_target"
    )
