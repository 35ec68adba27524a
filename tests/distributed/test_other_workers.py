"""Going on with fewer Ray Train workers than a run began with."""

from __future__ import annotations

import pytest

from raysched.distributed.launch import run_training
from raysched.training.run_folder import open_run_folder, read_metrics
from tests.training.runs import rollout_config, run_loop
from tests.training.test_other_world_size import EXACT, LOSS_TOLERANCE, deviations

# The rate must not depend on the budget, which the second start raises.
CONSTANT = {"optimizer__schedule": "constant", "optimizer__warmup_fraction": 0.0}


def config_of(steps: int, workers: int):
    return rollout_config(training__budget__steps=steps, scaling__num_workers=workers, **CONSTANT)


@pytest.mark.ray
@pytest.mark.slow
def test_one_ray_worker_goes_on_where_two_ended(tmp_path, ray_session):
    for steps, workers in ((6, 2), (12, 1)):
        config = config_of(steps, workers)
        open_run_folder(config, tmp_path / "run", resume=workers == 1)
        result = run_training(config, run_dir=tmp_path / "run", report=lambda metrics: None)
        assert (result.status, result.compute["steps"]) == ("finished", steps)
    run_loop(config_of(12, 0), tmp_path / "straight")
    points, expected = (read_metrics(tmp_path / name) for name in ("run", "straight"))
    for mine, theirs in zip(points, expected, strict=True):
        assert [mine["metrics"][key] for key in EXACT] == [theirs["metrics"][key] for key in EXACT]
    loss, weights = deviations(tmp_path / "run", tmp_path / "straight")
    assert max(loss, weights) < LOSS_TOLERANCE
