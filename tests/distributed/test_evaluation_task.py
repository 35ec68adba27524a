"""Evaluations as Ray tasks beside Ray Train's workers."""

from __future__ import annotations

import pytest

from raysched.distributed.evaluation_task import RayEvaluator, check_background_gpu
from raysched.distributed.launch import run_training
from raysched.errors import ConfigError
from raysched.training.run_folder import open_run_folder, read_metrics
from tests.training.runs import rollout_config, run_loop, small_config

SETTINGS = {"evaluation__enabled": True, "training__budget__steps": 60}


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_task_evaluates_what_the_loop_would_have(tmp_path, ray_session):
    config = rollout_config(scaling__num_workers=1, evaluation__placement="background", **SETTINGS)
    reports: list[dict] = []
    open_run_folder(config, tmp_path / "ray", resume=False)
    result = run_training(config, run_dir=tmp_path / "ray", report=reports.append)
    alone = run_loop(rollout_config(**SETTINGS), tmp_path / "alone")
    assert result.status == "finished"
    assert result.metrics == alone.metrics
    assert [report["step"] for report in reports] == [15, 30, 45, 60]
    found, expected = (
        [(p["step"], p["metrics"]) for p in read_metrics(tmp_path / n) if quality(p)]
        for n in ("ray", "alone")
    )
    assert found == expected
    assert result.compute["evaluation"] == alone.compute["evaluation"]
    assert result.compute["background_seconds"] > 0


def quality(point):
    return "quality/q" in point["metrics"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_task_that_fails_says_why(tmp_path, ray_session):
    evaluator = RayEvaluator(1, use_gpu=False)
    (tmp_path / "step-00000001").mkdir()
    evaluator.start(tmp_path / "step-00000001")
    end = evaluator.poll(60.0)
    assert end is not None, "no answer within 60 s"
    assert "job.json" in end.error


@pytest.mark.ray
def test_evaluations_beside_need_a_gpu_of_their_own(ray_session):
    config = small_config(
        scaling__num_workers=1,
        scaling__use_gpu=True,
        training__device="auto",
        evaluation__enabled=True,
        evaluation__placement="background",
    )
    with pytest.raises(ConfigError, match=r"one GPU beside those of the 1 workers, .* has 0"):
        check_background_gpu(config)
