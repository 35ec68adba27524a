"""Going on with another number of workers: the same rows and draws, numbers within rounding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from raysched.training.checkpoint import checkpoint_folders, load_checkpoint
from raysched.training.run_folder import read_metrics
from tests.training.ranks import run_loop_on
from tests.training.runs import rollout_config, run_loop
from tests.training.test_resume import StopAt

STOP_AT, STEPS = 6, 12
# Stated in the README: all_reduce adds the ranks' gradients in another order than one process.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-5
EXACT = (
    *("rollout/fraction", "rollout/mean_offset", "rollout/forwards"),
    *("compute/forward_equivalents", "train/learning_rate"),
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight")
    run_loop(rollout_config(), run_dir)
    return run_dir


def train_part(run_dir: Path, ranks: int, changes: dict[str, Any], stop_at: int) -> str:
    """One start of a run; says how it ended."""
    if ranks > 1:
        return str(run_loop_on(ranks, changes, run_dir, stop_at=stop_at)["status"])
    return run_loop(rollout_config(**changes), run_dir, tracker=StopAt(run_dir, stop_at)).status


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(checkpoint_folders(run_dir)[-1]).tensors["model"]


def deviations(run_dir: Path, other: Path) -> tuple[float, float]:
    """Largest relative difference of a logged loss, and of the weights as a whole."""
    loss = max(
        abs(mine["metrics"]["train/loss"] / theirs["metrics"]["train/loss"] - 1)
        for mine, theirs in zip(read_metrics(run_dir), read_metrics(other), strict=True)
    )
    mine, theirs = weights_of(run_dir), weights_of(other)
    apart = sum(float((mine[n] - theirs[n]).double().square().sum()) for n in theirs)
    size = sum(float(t.double().square().sum()) for t in theirs.values())
    return loss, math.sqrt(apart / size)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then", "strategy"), [(1, 2, "ddp"), (2, 1, "fsdp")])
def test_a_run_goes_on_with_another_number_of_workers(
    tmp_path, straight, first, then, strategy, monkeypatch
):
    monkeypatch.setattr("raysched.training.stop.POLL_S", 0.0)
    workers = {"scaling__strategy": strategy, "scaling__num_workers": first}
    changes = workers if strategy == "fsdp" else {}
    assert train_part(tmp_path, first, changes, STOP_AT) == "stopped"
    newest = checkpoint_folders(tmp_path)[-1]
    assert load_checkpoint(newest).step == STOP_AT
    assert len(list(newest.glob("model-*-of-*"))) == (first if strategy == "fsdp" else 0)
    assert train_part(tmp_path, then, {}, -1) == "finished"
    points, expected = read_metrics(tmp_path), read_metrics(straight)
    assert len(points) == len(expected) == STEPS
    for mine, theirs in zip(points, expected, strict=True):
        assert [mine["metrics"][key] for key in EXACT] == [theirs["metrics"][key] for key in EXACT]
    loss, weights = deviations(tmp_path, straight)
    print(f"{first} -> {then}: loss {loss:.1e}, weights {weights:.1e}")
    assert loss < LOSS_TOLERANCE
    assert weights < WEIGHT_TOLERANCE
