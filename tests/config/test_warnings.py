"""Settings that are written but have no effect."""

import pytest

from raysched.config.loading import dump, load_mapping
from raysched.config.run import RunConfig

SS = "scheduled_sampling"
ON = {"max_step_offset": 5, "probability": 0.5}


def warnings(mapping, *overrides):
    return load_mapping(mapping, "c.yaml", overrides).warnings


def rollout(**values):
    return {SS: {**ON, **values}}


CASES = [
    ({SS: {"max_step_offset": 5}}, "max_step_offset", "no ramp, so no sample is rolled out"),
    ({SS: {"max_step_offset": 5, "probability": 0.0}}, "max_step_offset", "the probability is 0"),
    (
        {SS: {"max_step_offset": 5, "ramp_steps": 9, "prob_end": 0.0}},
        "max_step_offset",
        "the ramp goes from 0 to 0",
    ),
    (rollout(prob_end=0.7), "prob_end", "there is no ramp; set ramp_steps"),
    (rollout(start_step=7), "start_step", "there is no ramp; set ramp_steps"),
    (rollout(prob_start=0.0), "prob_start", "there is no ramp; set ramp_steps"),
    (rollout(ramp_shape="cosine"), "ramp_shape", "there is no ramp; set ramp_steps"),
    (rollout(ramp_steps=10), "probability", "prob_start and prob_end count"),
    (rollout(sampler="euler", order=2), "order", "only dpm and unipc"),
    (rollout(sampler="rk4", order=2), "order", "only dpm and unipc"),
    (
        rollout(grid="jump", strategy="biased_late", max_step_offset=1),
        "strategy",
        "always one step",
    ),
    (rollout(grid="jump", max_step_offset=5), "max_step_offset", "always one step"),
    (rollout(dropout=True), "dropout", "model.dropout is 0"),
    (rollout(reflexflow=False, reflexflow_beta1=2.0), "reflexflow_beta1", "reflexflow is off"),
    (
        {"prediction_type": "epsilon", **rollout(reflexflow_beta1=2.0)},
        "reflexflow_beta1",
        "epsilon is no flow_matching",
    ),
    (rollout(grid=3), "max_step_offset", "longer rollouts are clamped"),
    ({SS: {"probability": 0.5}}, "probability", "max_step_offset is 0"),
    ({SS: {"reflexflow": True}}, "reflexflow", "max_step_offset is 0"),
    ({"exposure": "none", SS: {"max_step_offset": 5}}, "max_step_offset", "exposure is none"),
]


@pytest.mark.parametrize(("mapping", "field", "reason"), CASES)
def test_a_rollout_setting_without_effect_warns_once(mapping, field, reason):
    (line,) = warnings(mapping)
    assert line.startswith(f"c.yaml: {SS}.{field}: ")
    assert reason in line


OTHERS = [
    ({"noise_schedule": {"kind": "linear", "shift": 2.0}}, "noise_schedule.shift"),
    ({"noise_schedule": {"beta_start": 0.001}}, "noise_schedule.beta_start"),
    ({"noise_schedule": {"kind": "cosine", "beta_end": 0.1}}, "noise_schedule.beta_end"),
    ({"model": {"patch_size": 2}}, "model.patch_size"),
    ({"model": {"kind": "dit", "attention": True}}, "model.attention"),
    ({"model": {"class_conditional": False, "label_dropout": 0.2}}, "model.label_dropout"),
    ({"data": {"path": "x"}}, "data.path"),
    ({"data": {"grayscale": True}}, "data.grayscale"),
    ({"evaluation": {"enabled": False, "nfe": [4]}}, "evaluation.nfe"),
    ({"tracking": {"enabled": False, "uri": "x"}}, "tracking.uri"),
    ({"evaluation": {"sampler": "rk4", "nfe": [5, 8]}}, "evaluation.nfe"),
    ({"evaluation": {"sampler": "rk4", "nfe": [9], "guidance_scale": 2.0}}, "evaluation.nfe"),
    ({"evaluation": {"probe_share": 0.5}}, "evaluation.probe_share"),
    ({"training": {"device": "cuda"}}, "training.device"),
    (
        {"training": {"keep_best": 2}, "evaluation": {"placement": "background"}},
        "training.keep_best",
    ),
    ({"evaluation": {"placement": "ranks"}}, "evaluation.placement"),
]


@pytest.mark.parametrize(("mapping", "path"), OTHERS, ids=[c[1] for c in OTHERS])
def test_other_settings_without_effect_warn_once(mapping, path):
    (line,) = warnings(mapping)
    assert line.startswith(f"c.yaml: {path}: ")


@pytest.mark.parametrize(
    "mapping",
    [
        {},
        rollout(),
        {SS: {"max_step_offset": 5, "ramp_steps": 10, "prob_end": 0.3, "start_step": 5}},
        rollout(order="auto", sampler="euler"),
        rollout(reflexflow=False),
        {SS: {"max_step_offset": 0, "probability": 0.0, "reflexflow": False}},
        {"prediction_type": "v_prediction", "noise_schedule": {"kind": "flow", "shift": 3.0}},
        {"noise_schedule": {"num_train_timesteps": 50}},
        {"evaluation": {"sampler": "rk4", "nfe": [1, 5, 17]}},
        {"exposure": "none"},
    ],
)
def test_settings_that_take_effect_do_not_warn(mapping):
    assert warnings(mapping) == []


def test_turning_rollouts_off_on_the_command_line_says_at_most_one_short_line():
    file = rollout(sampler="dpm", order=3, grid=20, reflexflow_beta1=2.0, target="original")
    for override in (f"{SS}.max_step_offset=0", "exposure=none", f"{SS}.probability=0"):
        (line,) = warnings(file, override)
        assert line.startswith("command line: ")
        assert len(line) < 100
    assert warnings({"tracking": {"uri": "x"}}, "tracking.enabled=false") == []


def test_a_setting_on_the_command_line_without_effect_is_named_there():
    (line,) = warnings({SS: {**ON, "sampler": "euler"}}, f"{SS}.order=3")
    assert line.startswith(f"command line: {SS}.order: has no effect")


def test_a_dump_of_any_kind_of_run_does_not_warn():
    for mapping in (
        {},
        rollout(),
        {"exposure": "none", **rollout()},
        {"prediction_type": "sample"},
    ):
        config = load_mapping(mapping, "c").config
        again = load_mapping(dump(config), "dump")
        assert (again.config, again.warnings) == (config, [])
    assert load_mapping(dump(RunConfig()), "dump").raw == {"training": {"budget": {"steps": 900}}}
