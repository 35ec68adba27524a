import dataclasses
import json
from pathlib import Path

import pytest

from raysched.errors import DataError, LostResourcesError
from raysched.tuning.trial import TrialPlan, train_run, train_trial
from tests.tuning.synthetic import OFFSET, load, synthetic_train

CANDIDATE = {"trial_number": 3, "baseline": False, "assignments": {OFFSET: 2}, "tracking_id": ""}
BASELINE = {"trial_number": 0, "baseline": True, "assignments": {}, "tracking_id": ""}


def make_plan(tmp_path: Path, train, seeds=(0,)) -> TrialPlan:
    loaded = load(tmp_path, seeds=list(seeds))
    return TrialPlan(
        raw=loaded.base.raw,
        folder=tmp_path,
        budget=loaded.budget,
        seeds=tuple(seeds),
        store=None,
        train=train,
    )


def test_a_trial_is_the_base_run_with_its_settings_at_the_common_budget(tmp_path):
    plan = make_plan(tmp_path, None)
    config = plan.config(CANDIDATE, seed=7)
    assert config.scheduled_sampling.max_step_offset == 2
    assert config.scheduled_sampling.reflexflow is True
    assert config.training.budget.forward_equivalents == 1000
    assert config.training.budget.steps is None
    assert (config.seed, config.name, config.training.batch_size) == (7, "003", 10)


def test_the_baseline_differs_in_the_rollout_only(tmp_path):
    plan = make_plan(tmp_path, None)
    config = plan.config(BASELINE, seed=7)
    assert (config.exposure, config.scheduled_sampling.max_step_offset) == ("none", 0)
    other = plan.config(CANDIDATE, seed=7)
    for section in ("data", "model", "noise_schedule", "optimizer", "training", "evaluation"):
        assert getattr(config, section) == getattr(other, section)


def test_evaluations_are_reported_in_order_and_the_end_is_returned(tmp_path):
    reports = []
    plan = make_plan(tmp_path, synthetic_train(tmp_path / "log"))
    end = train_trial(CANDIDATE, plan, reports.append)
    assert [r["objective"] for r in reports] == pytest.approx([2.95, 1.95, 0.95, -0.05])
    assert [r["compute/forward_equivalents"] for r in reports] == [250, 500, 750, 1000]
    assert {r["run_dir"] for r in reports} == {str(tmp_path / "trials" / "003")}
    assert (end["ended"], end["status"], end["error"]) == (True, "finished", None)
    assert end["objective"] == pytest.approx(-0.05)
    assert end["seconds"] == 0.5


def test_with_several_seeds_the_first_is_reported_and_the_end_is_their_mean(tmp_path):
    reports = []
    train = synthetic_train(tmp_path / "log", quality="0.1 * K + seed")
    end = train_trial(CANDIDATE, make_plan(tmp_path, train, seeds=(1, 5)), reports.append)
    assert len(reports) == 4
    assert reports[-1]["objective"] == pytest.approx(1.2)
    assert end["objective"] == pytest.approx(3.2)
    assert end["quality/q_low"] == pytest.approx(3.19)
    assert end["quality/q_epsilon_scaled"] == pytest.approx(3.195)
    assert (end["seconds"], end["compute/forward_equivalents"]) == (1.0, 1000)
    assert "seed-5 seed 5" in (tmp_path / "log").read_text()


def test_what_stands_beside_q_goes_into_reports_and_the_end_has_its_mean(tmp_path):
    from raysched.training.result import RunResult

    def train(config, *, run_dir, report, **more):
        found = {"quality/q": 0.5, "quality/q_low": 0.4, "quality/recall": 0.25 + config.seed}
        spent = {"compute/forward_equivalents": 1000.0, "train/loss": 1.0}
        report({**found, **spent})
        return RunResult("finished", str(run_dir), metrics=found, compute={})

    reports = []
    end = train_trial(CANDIDATE, make_plan(tmp_path, train, seeds=(0, 1)), reports.append)
    assert [report["metrics"] for report in reports] == [{"recall": 0.25}]
    assert end["metrics"] == {"recall": 0.75}


def test_a_seed_that_is_done_is_not_trained_again(tmp_path):
    plan = make_plan(tmp_path, synthetic_train(tmp_path / "log"), seeds=(1, 5))
    first = train_trial(CANDIDATE, plan, lambda report: None)
    second = train_trial(CANDIDATE, plan, lambda report: None)
    assert second == first
    assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_a_failure_is_a_result_with_its_traceback_kept(tmp_path):
    plan = make_plan(tmp_path, synthetic_train(tmp_path / "log", fail_at=2))
    end = train_trial(CANDIDATE, plan, lambda report: None)
    assert (end["status"], end["diverged"]) == ("failed", False)
    assert end["error"].startswith("RuntimeError: the disk caught fire")
    assert "Traceback" in (tmp_path / "trials" / "003" / "error.txt").read_text()


def test_a_users_mistake_fails_with_its_message_and_without_a_traceback(tmp_path):
    def train(config, **more):
        raise DataError("data.path: no such folder")

    end = train_trial(CANDIDATE, make_plan(tmp_path, train), lambda report: None)
    assert end["error"] == "data.path: no such folder"
    assert not (tmp_path / "trials" / "003" / "error.txt").exists()


@pytest.mark.parametrize(
    ("error", "metrics", "told", "diverged"),
    [
        ("step 7: the loss is nan; lower the learning rate", {}, True, True),
        ("step 7: the network returned no finite number in 40% of its rollouts", {}, True, True),
        ("stopped", {"train/loss": float("inf")}, False, True),
        ("runs/nan: a banana was found", {"train/loss": 1.0}, False, False),
    ],
)
def test_it_says_whether_the_numbers_stopped_being_finite(
    tmp_path, error, metrics, told, diverged
):
    from raysched.training.result import RunResult

    def train(config, *, run_dir, **more):
        return RunResult("failed", str(run_dir), metrics=metrics, error=error, diverged=told)

    end = train_trial(CANDIDATE, make_plan(tmp_path, train), lambda report: None)
    assert (end["status"], end["error"], end["diverged"]) == ("failed", error, diverged)
    assert json.dumps(end)


def test_a_run_whose_rollouts_return_no_finite_number_is_a_trial_that_diverged(
    tmp_path, monkeypatch
):
    from raysched.training.setup import Run
    from tests.training.runs import rollout_config, run_loop

    monkeypatch.setattr(Run, "predict", lambda self, sample, *_, **__: sample * float("nan"))

    def train(config, *, run_dir, report, tracking):
        return run_loop(rollout_config(), run_dir, report=report)

    end = train_trial(CANDIDATE, make_plan(tmp_path, train), lambda report: None)
    assert "the network returned no finite number in 100% of the step's rollouts" in end["error"]
    assert (end["status"], end["diverged"]) == ("failed", True)


def test_a_sweep_that_is_stopping_begins_no_training(tmp_path):
    plan = make_plan(tmp_path, synthetic_train(tmp_path / "log"))
    plan.stop_file.touch()
    assert train_trial(CANDIDATE, plan, lambda report: None)["status"] == "stopped"
    assert not (tmp_path / "log").exists()


def test_relative_data_paths_start_from_the_drivers_folder(tmp_path):
    plan = dataclasses.replace(
        make_plan(tmp_path, None), root=tmp_path / "driver", raw={"data": {"cache_dir": "cache"}}
    )
    config = plan.config(BASELINE, seed=0)
    assert config.data.cache_dir == str(tmp_path / "driver" / "cache")


def test_a_trial_that_lost_its_place_in_the_cluster_is_to_be_begun_again(tmp_path):
    def lost(config, **how):
        raise LostResourcesError("its node has died")

    end = train_trial(CANDIDATE, make_plan(tmp_path, lost), print)
    assert (end["status"], end["again"], end["error"]) == ("stopped", True, "its node has died")
    kept = train_trial(CANDIDATE, make_plan(tmp_path, synthetic_train(tmp_path / "log")), print)
    assert (kept["status"], kept["again"]) == ("finished", False)


def test_a_trial_waits_for_room_as_long_as_it_takes(tmp_path, monkeypatch):
    asked = []

    def run_training(config, **how):
        asked.append(config.scaling.resource_timeout_s)

    monkeypatch.setattr("raysched.distributed.launch.run_training", run_training)
    config = make_plan(tmp_path, None).config(CANDIDATE, seed=0)
    train_run(config, run_dir=tmp_path / "run", report=print, tracking=None)
    assert asked == [None]
    # What is kept of the run is what the user asked for.
    assert "resource_timeout_s: null" not in (tmp_path / "run" / "config.yaml").read_text()
