"""Runs side by side, read from their folders: how their settings differ, and what came out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysched.config.idle import idle_keys
from raysched.config.run import RunConfig
from raysched.errors import UserError
from raysched.training.result import finite_json, read_result
from raysched.training.run_folder import CONFIG_FILE, flatten, read_config, read_metrics
from raysched.tuning.journal import JOURNAL_FILE
from raysched.tuning.records import Q_HIGH, Q_LOW, Point, Q

# Where a run lies and what it is called says nothing about why it is better.
NO_SETTINGS = ("name", "training.output_dir", "tracking.", "data.cache_dir", "training.storage_")


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison.

    Attributes:
        name: its folder's name, with as much of the path as tells it from the others.
        folder: where it lies.
        config: its resolved settings.
        status: finished, stopped, pruned, failed, or running where it has no result yet.
        metrics: of its last evaluation.
        forward_equivalents: compute spent.
        seconds: wall time.
        curve: quality at each evaluation.
    """

    name: str
    folder: Path
    config: RunConfig
    status: str
    metrics: dict[str, float]
    forward_equivalents: float
    seconds: float
    curve: tuple[Point, ...]

    @property
    def q(self) -> float | None:
        """The last quality, lower is better; None before the first evaluation."""
        return self.metrics.get(Q)

    def settings(self, keys: Sequence[str]) -> dict[str, Any]:
        """The settings by dotted key, without those that another one leaves without effect."""
        every = flatten(self.config.model_dump(mode="json"))
        idle = idle_keys(self.config, every.keys())
        return {key: every.get(key) for key in keys if key not in idle}

    def as_json(self, keys: Sequence[str]) -> dict[str, Any]:
        """One object: name, differing settings that have an effect, quality, compute."""
        row: dict[str, Any] = {
            "run": self.name,
            "folder": str(self.folder),
            "status": self.status,
            "settings": self.settings(keys),
            "q": self.q,
            "q_low": self.metrics.get(Q_LOW),
            "q_high": self.metrics.get(Q_HIGH),
            "forward_equivalents": self.forward_equivalents,
            "seconds": self.seconds,
            "metrics": {k: v for k, v in self.metrics.items() if k.startswith("quality/")},
            "curve": [[point.forward_equivalents, point.q] for point in self.curve],
        }
        content: dict[str, Any] = finite_json(row)
        return content


def gather(paths: Sequence[Path]) -> list[ComparedRun]:
    """Read runs; a sweep's folder stands for all its trials and seeds.

    Args:
        paths: folders of runs or sweeps.

    Raises:
        UserError: a folder holds neither, or nothing has been trained there.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        folders.update(dict.fromkeys(_run_folders(path)))
    names = _names(list(folders))
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def differing_keys(runs: Sequence[ComparedRun]) -> list[str]:
    """Dotted keys in which the runs' settings are not all the same, in the config's order."""
    if not runs:
        return []
    flats = [flatten(run.config.model_dump(mode="json")) for run in runs]
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    return [
        key
        for key in keys
        if not key.startswith(NO_SETTINGS) and any(f.get(key) != flats[0].get(key) for f in flats)
    ]


def _run_folders(path: Path) -> list[Path]:
    path = path.absolute()
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name folders of runs or sweeps, as in runs/")
    if (path / JOURNAL_FILE).is_file():
        found = sorted(file.parent for file in path.glob(f"trials/**/{CONFIG_FILE}"))
        if not found:
            raise UserError(f"{path}: no trial of this sweep has been trained yet")
        return found
    if (path / CONFIG_FILE).is_file():
        return [path]
    seeds = sorted(file.parent for file in path.glob(f"seed-*/{CONFIG_FILE}"))
    if not seeds:
        raise UserError(
            f"{path}: holds no run (no {CONFIG_FILE}) and no sweep (no {JOURNAL_FILE}); name the "
            "folder that `raysched train` or `raysched tune` printed"
        )
    return seeds


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    for length in range(1, max((len(f.parts) for f in folders), default=1) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read(folder: Path, name: str) -> ComparedRun:
    points = read_metrics(folder)
    result = read_result(folder)
    metrics: dict[str, float] = {}
    for point in points:
        metrics.update({k: v for k, v in point["metrics"].items() if isinstance(v, int | float)})
    if result is not None:
        metrics.update(result.metrics)
    last: dict[str, Any] = points[-1] if points else {}
    compute = result.compute if result is not None else {}
    spent = compute.get("forward_equivalents", last.get("forward_equivalents", 0.0))
    return ComparedRun(
        name=name,
        folder=folder,
        config=read_config(folder),
        status=result.status if result is not None else "running",
        metrics=metrics,
        forward_equivalents=float(spent),
        seconds=float(compute.get("seconds", last.get("seconds", 0.0))),
        curve=tuple(_curve(points)),
    )


def _curve(points: Sequence[dict[str, Any]]) -> list[Point]:
    evaluated = (p for p in points if p["metrics"].get(Q) is not None)
    return [Point(float(p["forward_equivalents"]), float(p["metrics"][Q])) for p in evaluated]


def numeric(value: Any) -> float | None:
    """A setting's place on an axis; None for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
