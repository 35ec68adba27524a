"""Trials of all sweeps have the same names; in a storage path each sweep has a place."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysched.tuning.trial import TrialPlan


@pytest.mark.parametrize(
    ("path", "seeds", "place"),
    [
        ("/store", (0,), "/store/digits-1/trials"),
        ("store", (0,), "/root-of-the-command/store/digits-1/trials"),
        ("s3://b/x?region=eu", (0,), "s3://b/x/digits-1/trials?region=eu"),
        ("/store", (0, 1), "/store/digits-1/trials/003"),
        (None, (0,), None),
    ],
)
def test_a_trials_runs_are_stored_below_their_sweep(path, seeds, place):
    plan = TrialPlan(
        raw={"training": {"storage_path": path}},
        folder=Path("/runs/digits-1"),
        budget=100.0,
        seeds=seeds,
        store=None,
        train=lambda *args, **options: None,
        root=Path("/root-of-the-command"),
    )
    trial = {"trial_number": 3, "baseline": False, "assignments": {}}
    config = plan.config(trial, seeds[0])
    assert config.training.storage_path == place
    assert config.training.budget.forward_equivalents == 100.0
