"""The settings of the methods that compete with scheduled sampling."""

from pathlib import Path

import pytest

from raysched.config.loading import baseline_config, dump, load_mapping
from raysched.config.space import load_sweep
from raysched.errors import ConfigError

SECTIONS = {
    "input_perturbation": {"gamma": 0.2},
    "self_correction": {"probability": 0.3, "noise": "same"},
    "defar": {"beta1": 2.0, "norm": "l1_mean", "jump_gradient": True},
    "mixflow": {"gamma": 0.5},
    "dream": {"power": 2.0},
}
METHODS_SPACE = Path(__file__).resolve().parents[2] / "tune_spaces" / "digits_methods.yaml"


def load(mapping, *overrides):
    return load_mapping(mapping, "c.yaml", overrides)


@pytest.mark.parametrize("method", SECTIONS)
def test_one_line_chooses_a_method_and_its_settings_count(method):
    bare = load({"exposure": method})
    assert (bare.config.exposure, bare.warnings) == (method, [])
    full = load({"exposure": method, method: SECTIONS[method]})
    assert full.warnings == []
    assert getattr(full.config, method) != getattr(bare.config, method)
    assert load(dump(full.config)).config == full.config


@pytest.mark.parametrize("method", SECTIONS)
def test_settings_of_a_method_that_is_not_chosen_warn_once(method):
    for exposure in ("none", "scheduled_sampling"):
        (line,) = load({"exposure": exposure, method: SECTIONS[method]}).warnings
        assert line.startswith(f"c.yaml: {method}.")
        assert f"exposure is {exposure}" in line


@pytest.mark.parametrize("method", SECTIONS)
def test_the_baseline_of_a_method_is_plain(method):
    loaded = load({"exposure": method, method: SECTIONS[method]})
    baseline = baseline_config(loaded.raw)
    assert baseline.exposure == "none"
    assert baseline.rollout.max_step_offset == 0
    assert load(dump(baseline)).warnings == []


def test_rollout_settings_beside_another_method_warn_once():
    rollout = {"max_step_offset": 5, "probability": 0.5, "grid": 20}
    (line,) = load({"exposure": "dream", "scheduled_sampling": rollout}).warnings
    assert "exposure is dream" in line
    (line,) = load({"scheduled_sampling": rollout}, "exposure=dream").warnings
    assert line.startswith("command line: exposure: ")


def test_the_norm_of_a_compensation_that_is_off_warns():
    (line,) = load({"exposure": "defar", "defar": {"alpha": 0.0, "norm": "l1_mean"}}).warnings
    assert line.startswith("c.yaml: defar.norm: ")


@pytest.mark.parametrize("method", ["defar", "mixflow"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_methods_of_flow_matching_refuse_other_predictions(method, prediction_type):
    with pytest.raises(ConfigError, match="unless prediction_type is flow_matching"):
        load({"exposure": method, "prediction_type": prediction_type})


WRONG = [
    ("input_perturbation.gamma", -0.1, "≥ 0"),
    ("self_correction.probability", 1.5, "≤ 1"),
    ("self_correction.noise", "new", "fresh"),
    ("mixflow.gamma", 2, "≤ 1"),
    ("dream.power", -1, "≥ 0"),
    ("defar.norm", "l2", "l1_sum"),
    ("exposure", "input_pertubation", "did you mean input_perturbation"),
]


@pytest.mark.parametrize(("path", "value", "rule"), WRONG, ids=[w[0] for w in WRONG])
def test_values_out_of_range_name_the_rule(path, value, rule):
    section, _, leaf = path.partition(".")
    with pytest.raises(ConfigError) as error:
        load({section: {leaf: value} if leaf else value})
    assert path in str(error.value)
    assert rule in str(error.value)


def test_the_rollouts_of_a_run_are_those_of_its_method():
    rollout = {"max_step_offset": 5, "probability": 0.5}
    config = load({"scheduled_sampling": rollout}).config
    assert config.rollout == config.scheduled_sampling
    defar = load({"exposure": "defar", "scheduled_sampling": rollout, "defar": {"beta1": 2.0}})
    jump = defar.config.rollout
    assert (jump.max_step_offset, jump.probability, jump.grid) == (1, 1.0, "jump")
    assert (jump.reflexflow, jump.reflexflow_beta1) == (True, 2.0)
    for method in ("none", "input_perturbation", "mixflow", "dream"):
        other = load({"exposure": method, "scheduled_sampling": rollout}).config
        assert other.rollout.max_step_offset == 0


def test_the_sweep_over_methods_begins_with_each_of_them_once():
    loaded = load_sweep(METHODS_SPACE)
    assert loaded.warnings == []
    methods = loaded.sweep.space["exposure"].values
    assert [point["exposure"] for point in loaded.sweep.search.points] == list(methods)
    assert set(methods) == {*SECTIONS, "scheduled_sampling"}
