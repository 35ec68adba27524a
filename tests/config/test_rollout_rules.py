"""Rollout settings that can't work together, and those that have no effect."""

from __future__ import annotations

import pytest

from raysched.config.loading import load_mapping
from raysched.errors import ConfigError

SS = "scheduled_sampling"
ON = {"max_step_offset": 5, "probability": 0.5, "reflexflow": False}


def mapping(kind="flow", model=None, **rollout):
    noise = {"noise_schedule": {"kind": kind}} if kind != "flow" else {}
    return {SS: {**ON, **rollout}, **noise, **({"model": model} if model else {})}


MISTAKES = [
    (mapping(t_min=0.5, t_max=0.4), "t_max", "leaves no target between t_min (0.5) and t_max"),
    (mapping(t_min=0.5, t_max=0.5), "t_max", "t_min must be < t_max"),
    (mapping("linear", t_min=0.5001, t_max=0.5009), "t_max", "no index i of 1000"),
    (mapping("linear", t_max=0.0), "t_max", "no index"),
    (mapping(t_min=0.6, source_t_max=0.5), "source_t_max", "no sample can be a target"),
    (mapping(t_min=0.5, source_t_max=0.52, grid=10), "source_t_max", "no room for a rollout"),
    (mapping("linear", t_min=0.7, source_t_max=0.7), "source_t_max", "no room for a rollout"),
    (mapping(grid=1), "source_t_max", "no room for a rollout"),
    (mapping(t_min=0.5, source_t_max=0.6, grid=10), "source_t_max", "no room for a rollout"),
    (mapping(t_min=1.0), "t_max", "leaves no target"),
    (mapping(ancestral=True), "ancestral", "must be false unless sampler is euler"),
    (mapping(ancestral=True, sampler="euler", target="original"), "target", "must be anchored or"),
    (mapping(grid="jump", jump_gradient=True, policy="ema"), "policy", "must be online"),
    (
        mapping(guidance_scale=2.0, model={"class_conditional": False}),
        "guidance_scale",
        "there is no label to be guided by",
    ),
    (mapping(reuse=0), "reuse", "got 0"),
    (mapping(reuse="some"), "reuse", "got 'some'"),
    (mapping(bucket=0), "bucket", "must be ≥ 1, got 0"),
    (mapping(max_fallback_share=1.5), "max_fallback_share", "got 1.5"),
    (mapping(t_max=1.2), "t_max", "got 1.2"),
]


@pytest.mark.parametrize(("config", "field", "text"), MISTAKES)
def test_settings_that_cannot_work_are_one_line_with_path_and_rule(config, field, text):
    with pytest.raises(ConfigError) as caught:
        load_mapping(config, "c.yaml")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"c.yaml: {SS}.{field}: ")
    assert text in line


@pytest.mark.parametrize(
    "config",
    [
        mapping("linear", t_min=0.5, t_max=0.5),
        mapping("linear", t_min=0.5, source_t_max=0.501),
        mapping(t_min=0.5, source_t_max=0.61, grid=10),
        mapping(t_min=0.5, source_t_max=0.50001, grid="jump", max_step_offset=1),
        mapping(t_min=0.2, t_max=0.6, source_t_max=0.9, stratified=True, reuse=3),
        mapping(guidance_scale=2.0, policy="ema", dropout=True, bucket=8, model={"dropout": 0.1}),
        mapping(ancestral=True, sampler="euler", target="posterior_mean"),
        mapping(grid="jump", jump_gradient=True, max_step_offset=1),
        mapping(offset_ramp_steps=10, offset_start=2, start_step=5, ramp_shape="cosine"),
    ],
)
def test_settings_that_work_do_so_without_a_word(config):
    assert load_mapping(config, "c.yaml").warnings == []


WARNINGS = [
    (mapping(offset_start=2), "offset_start", "there is no ramp of K"),
    (mapping(offset_ramp_steps=9, offset_start=8), "offset_start", "K falls along its ramp"),
    (mapping(posterior_reference=8), "posterior_reference", "target is not posterior_mean"),
    (mapping(jump_gradient=True), "jump_gradient", "it takes grid: jump"),
    (mapping(grid="jump", reuse="all", max_step_offset=1), "reuse", "always one step"),
    (mapping(guidance_scale=2.0, model={"label_dropout": 0}), "guidance_scale", "arbitrary"),
    (mapping(bucket=48), "bucket", "pads calls to 96 rows where micro-batches have 64"),
    (mapping(t_max=0.9, source_t_max=0.8), "t_max", "are teacher-forced"),
    ({SS: {"reuse": "all"}}, "reuse", "max_step_offset is 0"),
]


@pytest.mark.parametrize(("config", "field", "text"), WARNINGS)
def test_settings_without_effect_warn_once(config, field, text):
    (line,) = load_mapping(config, "c.yaml").warnings
    assert line.startswith(f"c.yaml: {SS}.{field}: ")
    assert text in line


def test_a_path_too_short_for_the_probe_is_refused():
    config = {
        "noise_schedule": {"kind": "linear", "num_train_timesteps": 7},
        "evaluation": {"probe_every_forward_equivalents": 1000.0},
    }
    with pytest.raises(ConfigError, match=r"probe_every_forward_equivalents: .*timesteps 7"):
        load_mapping(config, "c.yaml")
    config["noise_schedule"]["num_train_timesteps"] = 8
    load_mapping(config, "c.yaml")
