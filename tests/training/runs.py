"""Small real runs for the tests of the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raysched.config.loading import load_mapping
from raysched.config.run import RunConfig
from raysched.training.loop import train_loop
from raysched.training.protocols import NullTracker, Report, Tracker
from raysched.training.result import RunResult
from raysched.training.run_folder import holds_run, open_run_folder
from raysched.training.stop import clear_stop

SMALL: dict[str, Any] = {
    "data.limit": 200,
    "model.block_out_channels": [8, 16],
    "model.norm_num_groups": 4,
    "training.budget.steps": 12,
    "training.batch_size": 8,
    "training.log_every_steps": 1,
    "training.checkpoint_every_steps": 5,
    "training.device": "cpu",
    "evaluation.enabled": False,
    "evaluation.num_samples": 20,
    "evaluation.final_num_samples": 20,
    "evaluation.nfe": [2],
    "evaluation.num_bootstrap": 20,
    "scaling.num_workers": 0,
}
ROLLOUT: dict[str, Any] = {
    "scheduled_sampling.max_step_offset": 3,
    "scheduled_sampling.probability": 0.7,
    "scheduled_sampling.grid": 20,
    "scheduled_sampling.sampler": "unipc",
    "scheduled_sampling.reflexflow_norm": "l1_mean",
}
# Changes to `rollout_config`: jumps that keep their gradient.
GRADIENT_JUMP: dict[str, Any] = {
    "scheduled_sampling__grid": "jump",
    "scheduled_sampling__max_step_offset": 1,
    "scheduled_sampling__sampler": "euler",
    "scheduled_sampling__jump_gradient": True,
}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections."""
    out: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, leaf = key.split(".")
        place = out
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return out


def small_config(**changes: Any) -> RunConfig:
    """A run of a few small steps; keywords use `__` for the dot."""
    flat = {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}
    return load_mapping(nested(flat), "test").config


def rollout_config(**changes: Any) -> RunConfig:
    """The same with rollouts and ReflexFlow on."""
    rollout = {key.replace(".", "__"): value for key, value in ROLLOUT.items()}
    return small_config(**{**rollout, **changes})


def ignore_report(metrics: Any) -> None:
    """Report to nobody."""


def run_loop(
    config: RunConfig,
    run_dir: Path,
    *,
    report: Report = ignore_report,
    tracker: Tracker | None = None,
) -> RunResult:
    """Start or resume a run in a folder, in this process."""
    open_run_folder(config, run_dir, resume=holds_run(run_dir))
    clear_stop(run_dir)
    return train_loop(config, run_dir=run_dir, report=report, tracker=tracker or NullTracker())
