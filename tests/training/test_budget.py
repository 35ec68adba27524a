"""Learning rate, evaluations and the end follow the share of the budget spent."""

from __future__ import annotations

import pytest

from raysched.config.run import BudgetConfig, OptimizerConfig, RunConfig
from raysched.diffusion.compute import ComputeMeter
from raysched.training.budget import (
    evaluation_due,
    fraction_spent,
    learning_rate_at,
    picture_step,
)
from tests.training.runs import run_loop, small_config


def test_each_unit_is_counted_in_its_own_terms():
    meter = ComputeMeter()
    meter.forward("rollout", 40)
    meter.gradient(20)
    meter.forward("evaluation", 1000)
    meter.add_seconds("training", 3.0)
    meter.add_seconds("rollout", 1.0)
    meter.add_seconds("evaluation", 100.0)
    assert fraction_spent(BudgetConfig(steps=8), 2, meter) == 0.25
    assert fraction_spent(BudgetConfig(forward_equivalents=200.0), 2, meter) == 0.5
    assert fraction_spent(BudgetConfig(seconds=16.0), 2, meter) == 0.25


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0, 1, 2, 2, 2]), ("linear", [0, 1, 2, 1, 0]), ("cosine", [0, 1, 2, 1, 0])],
)
def test_learning_rate_warms_up_and_decays(schedule, expected):
    config = OptimizerConfig(learning_rate=2.0, warmup_fraction=0.2, schedule=schedule)
    rates = [learning_rate_at(config, fraction) for fraction in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx(expected, abs=1e-12)
    assert learning_rate_at(config, 1.3) == learning_rate_at(config, 1.0)


def test_evaluations_come_by_quarters_or_by_compute():
    quarters = small_config(evaluation__enabled=True)
    assert evaluation_due(quarters, (0.24, 240), (0.25, 250))
    assert not evaluation_due(quarters, (0.25, 250), (0.26, 260))
    assert evaluation_due(quarters, (0.99, 990), (1.02, 1020))
    by_compute = small_config(
        evaluation__enabled=True, evaluation__every_forward_equivalents=100.0
    )
    assert evaluation_due(by_compute, (0.1, 199), (0.2, 205))
    assert not evaluation_due(by_compute, (0.2, 205), (0.25, 299))
    assert not evaluation_due(small_config(), (0.9, 1), (1.0, 2))


def test_a_budget_in_forward_equivalents_ends_within_one_step(tmp_path):
    config = small_config(
        **{
            "scheduled_sampling__max_step_offset": 3,
            "scheduled_sampling__probability": 1.0,
            "scheduled_sampling__grid": 20,
            "training__budget__steps": None,
            "training__budget__forward_equivalents": 400.0,
        }
    )
    result = run_loop(config, tmp_path / "run")
    most = 8 * 3 + 8 * 3 + 8
    assert 400 <= result.compute["forward_equivalents"] < 400 + most


def test_a_budget_in_seconds_ends(tmp_path):
    config = small_config(training__budget__steps=None, training__budget__seconds=0.2)
    result = run_loop(config, tmp_path / "run")
    assert result.status == "finished"
    assert result.compute["seconds"] >= 0.2


@pytest.mark.parametrize(
    ("budget", "every", "moments", "places"),
    [
        # Two trials whose steps cost differently have pictures at the same places.
        ({"forward_equivalents": 1000}, None, [(0.26, 260), (1.01, 1010)], [250, 1000]),
        ({"forward_equivalents": 1000}, None, [(0.31, 310), (1.3, 1300)], [250, 1000]),
        ({"forward_equivalents": 1000}, 300.0, [(0.35, 350), (1.0, 1003)], [300, 1000]),
        ({"steps": 80}, None, [(0.25, 999), (1.0, 9999)], [20, 80]),
        ({"steps": 80}, 300.0, [(0.25, 620), (1.0, 901)], [600, 900]),
        ({"seconds": 10.0}, None, [(0.55, 1), (1.1, 2)], [5, 10]),
    ],
)
def test_pictures_stand_where_their_evaluation_fell_due(budget, every, moments, places):
    config = RunConfig(
        training={"budget": budget}, evaluation={"every_forward_equivalents": every}
    )
    assert [picture_step(config, *moment) for moment in moments] == places
