import random

import pytest
import yaml

from raysched.config.early_rules import ramp_end
from raysched.config.space import assign, load_sweep
from raysched.diffusion.forecast import step_forecast
from raysched.errors import ConfigError

SS = "scheduled_sampling."


def write(tmp_path, **changes):
    content = {
        "name": "x",
        "budget_forward_equivalents": 100 * 3 * 10,
        "overrides": {"training.batch_size": 10, SS + "max_step_offset": 2},
        "space": {SS + "ramp_steps": {"choice": [0, 20]}},
        "early_stopping": {"kind": "asha", "grace_fraction": 0.25},
        **changes,
    }
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("kind", ["asha", "hyperband", "median"])
def test_a_grace_period_that_ends_before_the_longest_ramp_is_refused_in_compute(tmp_path, kind):
    # 20 steps of 10 samples at 3 + 0.25 (2/2 + 1) forwards: 700 of 3,000.
    early = {"kind": kind, "grace_fraction": 0.24}
    assert load_sweep(write(tmp_path, early_stopping=early)).budget == 3000
    with pytest.raises(ConfigError, match="must not end before the ramp does") as caught:
        load_sweep(write(tmp_path, early_stopping={**early, "grace_fraction": 0.23}))
    assert "early_stopping.grace_fraction" in str(caught.value)
    assert "step 20, up to 700 forward equivalents, 0.23 of the budget" in str(caught.value)


def test_the_start_of_the_ramp_counts_and_without_early_stopping_nothing_does(tmp_path):
    space = {SS + "ramp_steps": {"choice": [0, 20]}, SS + "start_step": {"randint": [0, 11]}}
    with pytest.raises(ConfigError, match="must not end before the ramp does"):
        load_sweep(write(tmp_path, space=space))
    load_sweep(write(tmp_path, space=space, early_stopping={"kind": "none"}))


def test_ramps_that_nobody_takes_are_no_ramps(tmp_path):
    overrides = {"training.batch_size": 10, "exposure": "mixflow", SS + "ramp_steps": 90}
    space = {"mixflow.gamma": {"uniform": [0.1, 0.8]}}
    load_sweep(write(tmp_path, overrides=overrides, space=space))


def test_what_a_trial_can_not_have_at_once_is_not_added_up(tmp_path):
    # Long ramps with short rollouts, or the reverse; together they would take 0.39 of the budget.
    space = {
        SS + "max_step_offset": {"choice": [2, 8]},
        SS + "ramp_steps": {"choice": [8, 24]},
    }
    together = {"space": space, "early_stopping": {"kind": "asha", "grace_fraction": 0.3}}
    with pytest.raises(ConfigError, match="must not end before the ramp does"):
        load_sweep(write(tmp_path, **together))
    rule = f"{SS}max_step_offset * {SS}ramp_steps <= 64"
    load_sweep(write(tmp_path, **together, constraints=[rule]))
    space[SS + "ramp_steps"] = {"choice": [8, 24], "when": {SS + "max_step_offset": 2}}
    load_sweep(write(tmp_path, **together))


def test_a_rollout_that_is_biased_late_is_longer_and_its_ramp_costs_more(tmp_path):
    overrides = {"training.batch_size": 10, SS + "max_step_offset": 8, SS + "reflexflow": False}
    for strategy, end in (("biased_early", 733.3), ("uniform", 800.0), ("biased_late", 882.9)):
        given = {**overrides, SS + "strategy": strategy}
        loaded = load_sweep(write(tmp_path, overrides=given, early_stopping={"kind": "none"}))
        assert ramp_end(loaded.sweep, loaded.base.config)[0] == pytest.approx(end, abs=0.1)


@pytest.mark.parametrize("strategy", ["uniform", "biased_early", "biased_late"])
@pytest.mark.parametrize(
    "more",
    [
        {"reuse": "all"},
        {"reuse": 2},
        {"reuse": "all", "grid": "jump"},
        {"bucket": 8},
        {"bucket": 16, "sampler": "rk4", "reuse": 3, "guidance_scale": 2.0},
    ],
)
def test_reused_states_and_padding_count_until_the_ramp_ends(tmp_path, more, strategy):
    plain = {"max_step_offset": 6, "strategy": strategy, "prob_end": 1.0, "grid": 50}
    given = {SS + key: value for key, value in {**plain, **more}.items()}
    overrides = {"training.batch_size": 40, "model.class_conditional": True, **given}
    quiet = {"overrides": overrides, "early_stopping": {"kind": "none"}}
    loaded = load_sweep(write(tmp_path, budget_forward_equivalents=1e6, **quiet))
    most, end = ramp_end(loaded.sweep, loaded.base.config)
    run = assign(loaded.base.raw, {SS + "ramp_steps": 20})
    spent = sum(step_forecast(run, step).total for step in range(end))
    assert end == 20
    assert spent <= most <= 1.3 * spent


@pytest.mark.parametrize("name", ["digits_everything", "digits_schedule", "fashion_mnist_rollout"])
def test_no_trial_of_a_shipped_space_spends_more_until_its_ramp_ends(name):
    loaded = load_sweep(f"tune_spaces/{name}.yaml")
    most, _ = ramp_end(loaded.sweep, loaded.base.config)
    generator = random.Random(7)
    spent = []
    while len(spent) < 30:
        point = loaded.structure.random(generator)
        if loaded.structure.broken(point) is None:
            run = assign(loaded.base.raw, point)
            end = run.rollout.start_step + run.rollout.ramp_steps
            spent.append(sum(step_forecast(run, step).total for step in range(end)))
    assert 0 < max(spent) <= most


def test_several_objectives_are_pruned_by_rank_and_one_is_not(tmp_path):
    several = {"several": ["quality", "diversity"]}
    with pytest.raises(ConfigError, match="must be mo_asha or none"):
        load_sweep(write(tmp_path, objective=several))
    load_sweep(write(tmp_path, objective=several, early_stopping={"kind": "mo_asha"}))
    with pytest.raises(ConfigError, match="mo_asha needs"):
        load_sweep(write(tmp_path, early_stopping={"kind": "mo_asha"}))
