"""The loop inside Ray Train workers: the same numbers, the same ways to end."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from raysched.config.loading import write_yaml
from raysched.distributed.launch import run_training
from raysched.errors import ConfigError, DataError
from raysched.training.events import read_events
from raysched.training.files import check_writable
from raysched.training.run_folder import open_run_folder
from tests.training.runs import rollout_config, run_loop, small_config
from tests.training.test_resume import start, wait_for_step


def launch(config, run_dir, reports=None):
    open_run_folder(config, run_dir, resume=False)
    report = (lambda metrics: None) if reports is None else reports.append
    return run_training(config, run_dir=run_dir, report=report)


@pytest.mark.ray
def test_one_worker_computes_what_the_loop_computes_without_ray(tmp_path, ray_session):
    config = rollout_config(scaling__num_workers=1, evaluation__enabled=True)
    reports: list[dict] = []
    result = launch(config, tmp_path / "ray", reports)
    alone = run_loop(config, tmp_path / "alone")
    assert result.status == "finished"
    assert result.weights_sha256 == alone.weights_sha256
    assert result.metrics == alone.metrics
    spent = [report["compute/forward_equivalents"] for report in reports]
    assert len(spent) == 4
    assert spent == sorted(spent)
    assert reports[-1]["quality/q"] == alone.metrics["quality/q"]


@pytest.mark.ray
def test_two_workers_agree_with_one_process_up_to_rounding(tmp_path, ray_session):
    """Half the samples each, the same draws: only the order of the gradient's sum differs."""
    config = rollout_config(scaling__num_workers=2, training__budget__steps=6)
    two = launch(config, tmp_path / "two")
    one = run_loop(rollout_config(training__budget__steps=6), tmp_path / "one")
    for key in ("rollout", "training", "forward_equivalents"):
        assert two.compute[key] == one.compute[key]
    assert two.metrics["rollout/fraction"] > 0
    losses = [json.loads(line)["metrics"] for line in open_lines(tmp_path / "two")]
    expected = [json.loads(line)["metrics"] for line in open_lines(tmp_path / "one")]
    for mine, theirs in zip(losses, expected, strict=True):
        assert mine["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-3)
    assert two.metrics["train/loss"] == pytest.approx(one.metrics["train/loss"], rel=1e-4)


def open_lines(run_dir):
    return (run_dir / "metrics.jsonl").read_text().splitlines()


@pytest.mark.ray
def test_more_workers_than_the_cluster_has_is_refused_at_once(tmp_path, ray_session):
    config = small_config(scaling__num_workers=4, scaling__cpus_per_worker=2)
    with pytest.raises(ConfigError, match=r"need 8 CPUs, the cluster has 2: lower scaling"):
        launch(config, tmp_path / "run")


@pytest.mark.ray
def test_an_error_of_the_users_in_a_worker_is_one_message_and_raised_as_without_workers(
    tmp_path, ray_session
):
    config = small_config(
        scaling__num_workers=1, data__source="image_folder", data__path=str(tmp_path / "none")
    )
    check_writable(tmp_path)
    with pytest.raises(DataError, match="none") as refused:
        launch(config, tmp_path / "run")
    assert refused.value.exit_code == 2
    assert "Traceback" not in str(refused.value)
    # One worker needs no second start of its group to end.
    assert not any("was lost" in event for event in read_events(tmp_path / "run"))


def undisturbed(folder: Path, workers: int) -> dict:
    """What the command says about a run that nobody disturbs; the config is beside its folder."""
    config = rollout_config(
        training__budget__steps=200,
        training__checkpoint_every_steps=20,
        scaling__num_workers=workers,
    )
    write_yaml(config, folder / "config.yaml")
    process = start(folder / "run", "--json")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    result: dict = json.loads(out)
    return {**result, "folder": folder}


@pytest.fixture(scope="module", params=[1, 2])
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return undisturbed(tmp_path_factory.mktemp("straight"), request.param)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGKILL", -9)])
def test_a_signal_to_the_driver_costs_nothing(tmp_path, straight, name, code):
    shutil.copy(straight["folder"] / "config.yaml", tmp_path)
    run_dir = tmp_path / "run"
    process = start(run_dir)
    wait_for_step(process, run_dir, 30)
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=100)
    assert process.returncode == code
    again = start(run_dir, "--resume", "--json")
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    resumed = json.loads(out)
    assert resumed["weights_sha256"] == straight["weights_sha256"]
    assert resumed["metrics"] == straight["metrics"]
