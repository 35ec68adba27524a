"""The runs of a probe: their models, how they were trained, and the data that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from raysched.config.loading import load
from raysched.config.run import RunConfig
from raysched.data.dataset import ImageDataset, load_dataset
from raysched.errors import UserError
from raysched.evaluation.model_source import CONFIG_FILE, ModelSource, Weights, load_model

Training = Literal["rollouts", "plain", "other"]


@dataclass(frozen=True, eq=False)
class ProbedRun:
    """A model under the probe.

    Args:
        name: short, unique among the runs.
        training: with rollouts, plainly, or in another or unknown way.
        detail: the same for people, e.g. "rollouts, K=10".
        source: the model.
        run_dir: the run's folder, where its config and its tracking are; None if unknown.
    """

    name: str
    training: Training
    detail: str
    source: ModelSource
    run_dir: Path | None

    @property
    def label(self) -> str:
        """For legends and sentences."""
        return f"{self.name} ({self.detail})"


def load_runs(
    paths: Sequence[Path], weights: Weights = "ema"
) -> tuple[list[ProbedRun], ImageDataset]:
    """Load the models of a probe, and the data that they must have in common.

    Args:
        paths: folders of runs, checkpoints or pipelines.
        weights: averaged or last weights.

    Returns:
        The runs, and their data set.

    Raises:
        UserError: no model there, nobody knows the data, or the runs were trained on different
            data.
    """
    sources = [load_model(path, weights) for path in paths]
    homes = [_run_dir(source.home) for source in sources]
    configs = [load(home / CONFIG_FILE).config if home else None for home in homes]
    names = _unique_names(paths, sources)
    runs = [
        ProbedRun(name, *_training(config), source, home)
        for name, config, source, home in zip(names, configs, sources, homes, strict=True)
    ]
    return runs, _common_data(runs, configs)


def same_path(a: ProbedRun, b: ProbedRun) -> bool:
    """Whether two runs have the same alpha and sigma, so that their states can be compared."""
    u = torch.linspace(0, 1, 21, dtype=torch.float64)
    ours, theirs = (torch.stack(run.source.schedule.alpha_sigma(u)) for run in (a, b))
    return bool(torch.allclose(ours, theirs, atol=1e-9))


def _run_dir(home: Path) -> Path | None:
    """The run that a model belongs to: a pipeline lies in its run's folder, or alone."""
    for folder in (home, home.resolve().parent):
        if (folder / CONFIG_FILE).is_file():
            return folder
    return None


def _training(config: RunConfig | None) -> tuple[Training, str]:
    if config is None:
        return "other", "training unknown"
    rollout = config.scheduled_sampling
    chance = rollout.probability
    if rollout.ramp_steps:
        chance = max(rollout.prob_start, rollout.prob_end)
    if config.exposure not in ("none", "scheduled_sampling"):
        return "other", config.exposure.replace("_", " ")
    if config.exposure == "none" or rollout.max_step_offset == 0 or chance == 0:
        return "plain", "no rollouts"
    return "rollouts", f"rollouts, K={rollout.max_step_offset}"


def _unique_names(paths: Sequence[Path], sources: Sequence[ModelSource]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    whole = [path.resolve().parts for path in paths]
    inside = [
        path.resolve() != source.home.resolve()
        for path, source in zip(paths, sources, strict=True)
    ]
    count = 1
    while True:
        # A checkpoint's own folder says its step only: the run's name goes before.
        names = [
            str(Path(*(parts[-count:] if not below else (parts[-3], *parts[-count:]))))
            for parts, below in zip(whole, inside, strict=True)
        ]
        if len(set(names)) == len(names) or count >= max(map(len, whole)):
            break
        count += 1
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{twice}: named twice; name every run once")
    return names


def _common_data(runs: Sequence[ProbedRun], configs: Sequence[RunConfig | None]) -> ImageDataset:
    known = [(r, load_dataset(c.data)) for r, c in zip(runs, configs, strict=True) if c]
    if not known:
        raise UserError(
            f"{runs[0].source.loaded_from}: a pipeline by itself doesn't say which data it was "
            "trained on; name its run's folder, or probe it together with a run"
        )
    first, dataset = known[0]
    for run, other in known[1:]:
        if other.fingerprint != dataset.fingerprint:
            raise UserError(
                f"{run.name} and {first.name} were trained on different data, or split "
                "differently; probe them one by one"
            )
    shape = (dataset.channels, dataset.image_size, dataset.image_size)
    for run in runs:
        if run.source.shape != shape or len(run.source.class_names) != dataset.num_classes:
            raise UserError(
                f"{run.name}: makes images of shape {run.source.shape} in "
                f"{len(run.source.class_names)} classes, but the data have {shape} in "
                f"{dataset.num_classes}; probe it by itself"
            )
    return dataset
