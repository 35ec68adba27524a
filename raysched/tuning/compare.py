"""Candidates against the baseline, from the samples that their runs saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raysched.config.run import RunConfig
from raysched.errors import StorageError
from raysched.tuning.records import TrialRecord
from raysched.tuning.verdict import Comparison

if TYPE_CHECKING:
    from torch import Tensor

# Intervals of the verdict deserve more replicates than those of an evaluation on the way.
MIN_REPLICATES = 1000


def compare_with_baseline(
    baseline: TrialRecord,
    candidates: Sequence[TrialRecord],
    *,
    config: RunConfig,
    seeds: Sequence[int],
) -> list[Comparison]:
    """Paired bootstrap of q of the baseline minus q of each candidate, over seeds and samples.

    Args:
        baseline: the teacher-forced trial.
        candidates: trials that reached the budget.
        config: the base run: data, metric, features, level of the intervals.
        seeds: training seeds of each trial; others that a folder holds are not looked at.

    Raises:
        StorageError: a run's samples are missing.
    """
    from raysched.data.dataset import load_dataset
    from raysched.evaluation.evaluate import compare

    if not candidates:
        return []
    dataset = load_dataset(config.data)
    own = _samples(baseline, seeds)
    found = []
    for candidate in candidates:
        difference = compare(
            list(zip(own, _samples(candidate, seeds), strict=True)),
            config=config,
            dataset=dataset,
            num_bootstrap=max(MIN_REPLICATES, config.evaluation.num_bootstrap),
        )
        found.append(
            Comparison(
                number=candidate.number,
                difference=difference.difference,
                low=difference.low,
                high=difference.high,
                confidence=config.evaluation.confidence,
                dof=difference.dof,
            )
        )
    return found


def metric_name(config: RunConfig) -> str:
    """The quality's name for people."""
    from raysched.evaluation.evaluate import METRIC_LABELS

    label = METRIC_LABELS[config.evaluation.metric]
    network = config.evaluation.features == "efficientnet_lite0"
    return f"{label} (EffNet-Lite0)" if network else label


def run_folders(trial: TrialRecord, seeds: Sequence[int] | None = None) -> list[Path]:
    """The folders of a trial's runs, by seed; only those of `seeds`, if given."""
    folder = Path(trial.run_dir)
    found = {int(path.name[5:]): path for path in folder.glob("seed-*")}
    return [found[seed] for seed in sorted(found) if seeds is None or seed in seeds] or [folder]


def final_samples(run_dir: Path) -> tuple[dict[int, Tensor], Tensor]:
    """The samples that a run saved at the end of its budget.

    Returns:
        NFE -> (n, C, H, W) uint8, and the (n,) labels.

    Raises:
        StorageError: they are missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = run_dir / "final_samples.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{path}: the run's samples can't be read ({error}); train it again to compare it"
        ) from error
    labels = tensors.pop("labels")
    return {int(name.removeprefix("nfe_")): images for name, images in tensors.items()}, labels


def _samples(trial: TrialRecord, seeds: Sequence[int]) -> list[dict[int, Tensor]]:
    folders, count = run_folders(trial, seeds), len(seeds)
    if len(folders) != count:
        raise StorageError(f"{trial.run_dir}: {len(folders)} of {count} seeds have been trained")
    return [final_samples(folder)[0] for folder in folders]
