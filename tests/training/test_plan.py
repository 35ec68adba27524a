"""`raysched plan`: its forecast against real runs, and that it leaves nothing behind."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from raysched.cli import main
from raysched.config.loading import write_yaml
from raysched.diffusion.forecast import MAX_DRAWN_STEPS, drawn_forecast, forecast_run
from raysched.errors import DataError
from raysched.training import measure
from raysched.training.checkpoint import checkpoint_folders
from raysched.training.measure import measure_speed, safetensors_bytes
from raysched.training.out_of_memory import StepMemoryError
from raysched.training.plan import Plan, plan_run
from raysched.training.run_folder import read_metrics
from raysched.training.setup import build_run
from tests.training.runs import GRADIENT_JUMP, ROLLOUT, rollout_config, run_loop, small_config

pytestmark = pytest.mark.usefixtures("few_steps")
SHARED = ("forward_equivalents", "seconds", "peak_memory_bytes", "disk_bytes")
BATCH = {"training__batch_size": 32, "training__budget__steps": 50}
CASES: dict[str, dict[str, Any]] = {
    "ramp, accumulation": {
        **BATCH,
        "scheduled_sampling__ramp_steps": 40,
        "scheduled_sampling__prob_end": 1.0,
        "training__gradient_accumulation": 2,
    },
    "DDPM, rk4": {
        **BATCH,
        "prediction_type": "epsilon",
        "noise_schedule__kind": "cosine",
        "scheduled_sampling__sampler": "rk4",
        "scheduled_sampling__probability": 1.0,
    },
    "windows, guidance, strata, padding": {
        **BATCH,
        "scheduled_sampling__probability": 0.8,
        "scheduled_sampling__t_min": 0.2,
        "scheduled_sampling__t_max": 0.9,
        "scheduled_sampling__guidance_scale": 1.5,
        "scheduled_sampling__stratified": True,
        "scheduled_sampling__bucket": 4,
    },
    "gradient through a jump": {
        **BATCH,
        "exposure": "defar",
    },
    # Small steps: the last one may overshoot by most of itself.
    "budget in FE": {
        "training__budget__steps": None,
        "training__budget__forward_equivalents": 4000.0,
    },
}


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure less: these tests ask for counts and sizes, not for times."""
    monkeypatch.setattr(measure, "MAX_STEPS", 5)


def rollouts(case: str) -> dict[str, Any]:
    """ROLLOUT without what the case makes idle, and the case's own settings."""
    dropped = {
        "ramp, accumulation": {"scheduled_sampling.probability"},
        "DDPM, rk4": {"scheduled_sampling.reflexflow_norm"},
    }.get(case, set())
    if CASES[case].get("exposure") == "defar":
        return CASES[case]
    kept = {k.replace(".", "__"): v for k, v in ROLLOUT.items() if k not in dropped}
    return {**kept, **CASES[case]}


@pytest.mark.parametrize("case", CASES)
def test_the_forecast_of_compute_and_disk_is_what_the_run_then_takes(
    case: str, tmp_path: Path
) -> None:
    config = small_config(**rollouts(case))
    plan = plan_run(config)
    result = run_loop(config, tmp_path)
    assert plan.forward_equivalents == pytest.approx(
        result.compute["forward_equivalents"], rel=0.02
    )
    assert plan.rollout > 0
    assert plan.disk_bytes == pytest.approx(result.compute["disk_bytes"], rel=0.02)
    assert set(SHARED) <= plan.as_json().keys() & result.compute.keys()


SHORT: dict[str, dict[str, Any]] = {
    "reflexflow": {},
    "wide rollouts": {
        "prediction_type": "epsilon",
        "noise_schedule__kind": "linear",
        "noise_schedule__num_train_timesteps": 100,
        "scheduled_sampling__reflexflow_norm": None,
        "scheduled_sampling__grid": 33,
        "scheduled_sampling__max_step_offset": 40,
        "scheduled_sampling__t_max": 0.5,
        "scheduled_sampling__source_t_max": 0.7,
        "scheduled_sampling__strategy": "biased_late",
        "scheduled_sampling__sampler": "dpm",
    },
    "reuse": {
        "scheduled_sampling__sampler": "euler",
        "scheduled_sampling__ancestral": True,
        "scheduled_sampling__reuse": "all",
        "scheduled_sampling__max_step_offset": 9,
    },
    "strata, guidance, ramp": {
        "scheduled_sampling__probability": None,
        "scheduled_sampling__prob_end": 0.9,
        "scheduled_sampling__ramp_steps": 8,
        "scheduled_sampling__stratified": True,
        "scheduled_sampling__guidance_scale": 2.0,
    },
    "jump with gradient": GRADIENT_JUMP,
    "self-correction": {"exposure": "self_correction"},
    "defar": {"exposure": "defar"},
    "dream": {"exposure": "dream", "prediction_type": "epsilon", "noise_schedule__kind": "cosine"},
}


@pytest.mark.parametrize("case", SHORT)
def test_the_compute_of_a_short_run_is_known_to_the_last_forward(
    case: str, tmp_path: Path
) -> None:
    changes = SHORT[case]
    if "exposure" not in changes:
        on = {key.replace(".", "__"): value for key, value in ROLLOUT.items()}
        changes = {key: value for key, value in {**on, **changes}.items() if value is not None}
    config = small_config(**changes)
    plan, compute = plan_run(config), run_loop(config, tmp_path).compute
    found = {key: compute[key] for key in ("forward_equivalents", "rollout", "training")}
    assert found == {
        "forward_equivalents": plan.forward_equivalents,
        "rollout": plan.rollout,
        "training": plan.training,
    }
    assert plan.rollout > 0


def test_a_long_run_is_forecast_without_its_draws() -> None:
    config = rollout_config(training__budget__steps=MAX_DRAWN_STEPS + 1)
    forecast = forecast_run(config)
    assert drawn_forecast(config, forecast) is forecast
    drawn = rollout_config(training__budget__steps=MAX_DRAWN_STEPS)
    expected = forecast_run(drawn).rollout
    counted = drawn_forecast(drawn, forecast_run(drawn)).rollout
    assert counted == int(counted) != expected
    assert counted == pytest.approx(expected, rel=0.02)


def test_a_plain_run_is_forecast_exactly() -> None:
    plan = plan_run(small_config())
    assert (plan.forward_equivalents, plan.steps, plan.rollout) == (12 * 8 * 3, 12, 0.0)
    assert plan.fe_per_step_start == plan.fe_per_step_end == 24
    assert plan.evaluation_seconds == plan.num_evaluations == 0
    assert plan.seconds == pytest.approx(12 * plan.seconds_per_step)
    assert plan.notes == ()


def test_a_budget_in_seconds_is_used_up_to_the_last_step() -> None:
    config = small_config(training__budget__steps=None, training__budget__seconds=5.0)
    plan = plan_run(config)
    assert 5.0 <= plan.seconds <= 5.0 + plan.seconds_per_step * 1.001
    assert plan.forward_equivalents == 24 * plan.steps


def test_evaluations_are_counted_as_the_loop_makes_them(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "evaluation__enabled": True,
        "evaluation__every_forward_equivalents": 100.0,
    }
    config = small_config(**changes)
    run_loop(config, tmp_path)
    made = [p for p in read_metrics(tmp_path) if "quality/q" in p["metrics"]]
    plan = plan_run(config)
    assert plan.num_evaluations == len(made) == 3
    assert plan.evaluation_seconds > 0


def test_planning_moves_no_random_stream_and_no_thread_count() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    plan_run(small_config(model__dropout=0.1))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


def test_measuring_leaves_the_weights_as_they_are() -> None:
    config = rollout_config()
    run = build_run(config)
    before = {name: p.detach().clone() for name, p in run.policy.named_parameters()}
    speed = measure_speed(run, config)
    assert speed.per_step > 0
    assert speed.per_rollout_fe > 0
    assert all(torch.equal(before[name], p) for name, p in run.policy.named_parameters())


def test_several_workers_are_measured_by_the_share_of_one() -> None:
    changes: dict[str, Any] = {"scaling__num_workers": 2, "training__batch_size": 16}
    plan = plan_run(small_config(**changes))
    assert plan.forward_equivalents == 12 * 16 * 3
    assert len(plan.notes) == 1
    assert "one of 2 workers" in plan.notes[0]


def test_the_size_of_a_safetensors_file_is_known_before_it_is_written() -> None:
    for names in (["a"], ["a", "b.c"], ["weight/exp_avg", "weight/step", "x"]):
        tensors = {name: torch.zeros(3, len(name)) for name in names}
        assert safetensors_bytes(tensors) == len(save(tensors))


def test_the_command_prints_one_object_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_yaml(small_config(), tmp_path / "run.yaml")
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "run.yaml", "--training.budget.steps", "20", "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["forward_equivalents"] == 20 * 24
    assert set(SHARED) <= printed.keys()
    assert all(printed[key] > 0 for key in SHARED)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_person_gets_a_table_and_a_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_yaml(small_config(evaluation__enabled=True), tmp_path / "run.yaml")
    assert main(["plan", str(tmp_path / "run.yaml")]) == 0
    printed = capfd.readouterr().out
    assert "forward equivalents" in printed
    assert "12 steps will take about" in printed
    assert "4 evaluation(s) add about" in printed


def test_mistakes_end_like_those_of_train(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tmp_path / "none.yaml"), "--json"]) == 2
    assert "none.yaml" in json.loads(capfd.readouterr().out)["error"]
    assert main(["plan", "scheduled_sampling.max_step_offset=-1", "--json"]) == 2
    assert "max_step_offset" in json.loads(capfd.readouterr().out)["error"]
    missing = {"data__source": "image_folder", "data__path": str(tmp_path / "away")}
    with pytest.raises(DataError, match="away"):
        plan_run(small_config(**missing))


def test_memory_that_runs_out_while_measuring_is_one_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def scarce(*arguments: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: you tried to allocate 8 bytes.")

    monkeypatch.setattr(measure, "train_step", scarce)
    with pytest.raises(StepMemoryError, match=r"step \d+: out of memory at micro-batches of"):
        plan_run(small_config())


def test_checkpoints_beyond_keep_last_are_not_counted(tmp_path: Path) -> None:
    one, two = (plan_run(small_config(training__keep_last=n)) for n in (1, 2))
    assert isinstance(one, Plan)
    assert one.disk_bytes == one.checkpoint_bytes
    assert two.disk_bytes == 2 * two.checkpoint_bytes
    run_loop(small_config(training__keep_last=2), tmp_path)
    assert len(checkpoint_folders(tmp_path)) == 2
