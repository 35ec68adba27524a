"""The forecast of a sweep: corners, what is infeasible, and numbers that follow from others."""

from __future__ import annotations

import itertools
import json

import pytest

from raysched.config.structure import Structure
from raysched.config.sweep import Dimension
from raysched.errors import ConfigError
from raysched.tuning.corners import MAX_CORNERS, corners, ends
from raysched.tuning.sweep_plan import plan_sweep
from tests.tuning.synthetic import OFFSET, load

RAMP = "scheduled_sampling.ramp_steps"
END = "scheduled_sampling.prob_end"


def test_both_ends_of_every_kind_are_values_that_a_trial_could_get():
    assert ends(Dimension(uniform=(0.5, 2.0))) == (0.5, 2.0)
    assert ends(Dimension(loguniform=(0.01, 10.0))) == pytest.approx((0.01, 10.0))
    assert ends(Dimension(quniform=(0.0, 0.4, 0.1))) == (0.0, 0.4)
    assert ends(Dimension(randint=(1, 5))) == (1, 4)
    assert ends(Dimension(lograndint=(1, 11))) == (1, 10)
    assert ends(Dimension(qrandint=(2, 8, 2))) == (2, 8)
    assert ends(Dimension(choice=("a", "b", "c"))) == ("a", "b", "c")
    assert ends(Dimension(randint=(3, 4))) == (3,)


def test_corners_of_a_small_space_are_all_combinations_that_conditions_leave():
    space = {
        RAMP: Dimension(choice=(0, 10)),
        OFFSET: Dimension(randint=(1, 5)),
        END: Dimension(uniform=(0.1, 0.9), when={RAMP: {"min": 1}}),
    }
    found = corners(Structure(space, {}))
    assert sorted(map(json.dumps, found)) == sorted(
        [json.dumps({RAMP: 0, OFFSET: k}) for k in (1, 4)]
        + [
            json.dumps({RAMP: 10, OFFSET: k, END: p})
            for k, p in itertools.product((1, 4), (0.1, 0.9))
        ]
    )


def test_of_a_large_space_so_many_different_corners_are_drawn():
    space = {f"model.x{i}": Dimension(uniform=(0.0, 1.0)) for i in range(12)}
    found = corners(Structure(space, {}))
    assert len({json.dumps(c) for c in found}) == len(found) == MAX_CORNERS


def forecast(tmp_path, **changes):
    overrides = {
        "tracking.enabled": False,
        "scaling.num_workers": 0,
        "scheduled_sampling.probability": 0.5,
        "training.batch_size": 8,
        "model.block_out_channels": [16],
        "evaluation.num_samples": 16,
        "evaluation.final_num_samples": 16,
        "evaluation.nfe": [2],
        **changes.pop("overrides", {}),
    }
    early = {"early_stopping": {"kind": "none"}, **changes}
    loaded = load(tmp_path, overrides=overrides, **early)
    return plan_sweep(loaded, price_per_hour=3.0, max_corners=2)


def test_a_forecast_adds_up(tmp_path):
    plan = forecast(tmp_path, seeds=[0, 1])
    assert plan.forward_equivalents.expected == (4 + 1) * 2 * 1000
    assert (plan.num_trials, plan.num_seeds) == (4, 2)
    assert plan.hours.low <= plan.hours.expected <= plan.hours.high
    assert plan.money.expected == pytest.approx(3.0 * plan.hours.expected)
    # Longer than the trainings alone, on as many places as there are.
    alone = 10 * plan.trial_seconds.expected / plan.concurrent / 3600
    assert alone < plan.hours.expected
    assert (plan.infeasible_share, plan.num_refused, plan.num_corners) == (0.0, 0, 8)
    assert set(plan.measured) >= {"baseline", "max_step_offset=8"}
    assert plan.disk_bytes > 0
    assert json.dumps(plan.as_json())


def test_corners_that_the_run_model_refuses_are_infeasible(tmp_path):
    window = {"scheduled_sampling.t_min": {"choice": [0.0, 0.6]}}
    window["scheduled_sampling.t_max"] = {"choice": [0.4, 1.0]}
    plan = forecast(tmp_path, space={OFFSET: {"choice": [1]}, **window})
    # An empty window, from 0.6 to 0.4, is one of the four.
    assert (plan.num_refused, plan.num_corners, plan.infeasible_share) == (1, 4, 0.25)


def test_a_trial_that_no_machine_like_this_could_run_is_said_before_anything_is_measured(tmp_path):
    with pytest.raises(ConfigError, match=r"each trial needs \d+ CPUs, the cluster has"):
        forecast(tmp_path, overrides={"scaling.cpus_per_worker": 4000})
