"""A sweep as its folder tells it, without running anything."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raysched.config.loading import load
from raysched.config.run import RunConfig
from raysched.config.sweep import SweepConfig
from raysched.errors import StorageError, UserError
from raysched.tuning.fixed_cost import fixed_cost
from raysched.tuning.folder import BASE_FILE, SWEEP_FILE
from raysched.tuning.journal import JOURNAL_FILE, apply_event, read_events
from raysched.tuning.records import SweepResult, TrialRecord, Verdict

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class StoredSweep:
    """What a sweep's folder holds.

    Attributes:
        sweep: its settings.
        base: its base run.
        result: its trials, and its verdict once it has ended.
    """

    sweep: SweepConfig
    base: RunConfig
    result: SweepResult


def load_stored_sweep(folder: Path) -> StoredSweep:
    """Read a sweep's folder.

    Args:
        folder: as `raysched tune` printed it; the sweep may still be running.

    Raises:
        UserError: it holds no sweep.
        StorageError: a file in it is damaged.
    """
    folder = folder.absolute()
    if not (folder / JOURNAL_FILE).is_file() or not (folder / SWEEP_FILE).is_file():
        raise UserError(
            f"{folder}: holds no sweep (no {JOURNAL_FILE}); name the folder that `raysched tune` "
            "printed, such as runs/digits-rollout-20260101-120000"
        )
    try:
        plain = yaml.safe_load((folder / SWEEP_FILE).read_text(encoding="utf-8"))
        sweep = SweepConfig.model_validate(plain)
    except (ValueError, yaml.YAMLError) as error:
        raise StorageError(f"{folder / SWEEP_FILE}: can't be read: {error}") from error
    base = load(folder / BASE_FILE).config
    records: dict[int, TrialRecord] = {}
    for event in read_events(folder / JOURNAL_FILE):
        apply_event(records, event)
    trials = [records[number] for number in sorted(records)]
    for trial in trials:
        _moved(trial, folder)
    return StoredSweep(sweep, base, _result(folder, sweep, base, trials))


def _moved(trial: TrialRecord, folder: Path) -> None:
    """A sweep's folder may have been copied elsewhere: its trials lie below it."""
    here = folder / "trials" / trial.name
    if here.is_dir():
        trial.run_dir = str(here)


def _result(
    folder: Path, sweep: SweepConfig, base: RunConfig, trials: list[TrialRecord]
) -> SweepResult:
    path = folder / RESULT_FILE
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        stored = {}
    except ValueError as error:
        raise StorageError(f"{path}: can't be read: {error}; remove it to go on") from error
    budget = sweep.budget_forward_equivalents or base.training.budget.forward_equivalents
    if not budget:
        spent = [trial.forward_equivalents for trial in trials if trial.baseline]
        budget = stored.get("budget_forward_equivalents") or max(spent, default=0.0)
    winner = (stored.get("winner") or {}).get("number")
    verdict = stored.get("verdict")
    return SweepResult(
        folder.name,
        stored.get("status", "stopped"),
        folder,
        trials,
        winner=next((trial for trial in trials if trial.number == winner), None),
        verdict=Verdict(**verdict) if verdict else None,
        files=stored.get("files", {}),
        error=stored.get("error"),
        budget=float(budget),
        pareto=stored.get("pareto"),
        fixed_cost=fixed_cost(trials),
    )
