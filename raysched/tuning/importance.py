"""Which searched settings quality depends on, with the uncertainty of that statement.

Functional ANOVA of a forest over the trials (Hutter et al. 2014, as in Optuna), on resampled
trials: with few trials the shares scatter, and the reader shall see how much. Quality is taken at
the last evaluation that all trials share, so that those stopped early count, and equally.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from raysched.config.sweep import Dimension
from raysched.tuning.records import TrialRecord

# A forest over fewer says nothing.
MIN_TRIALS = 6
NUM_RESAMPLES = 20
NUM_TREES = 32


@dataclass(frozen=True)
class Importance:
    """One setting's share of the variance of q.

    Attributes:
        key: dotted key.
        share: mean over the resamples, in [0, 1]; all settings together give 1.
        low: 10th percentile over the resamples.
        high: 90th percentile.
    """

    key: str
    share: float
    low: float
    high: float


def shared_quality(trials: Sequence[TrialRecord]) -> dict[int, float]:
    """q of each candidate at the last evaluation that all of them have, by number."""
    curves = {
        trial.number: [point.q for point in trial.curve if math.isfinite(point.q)]
        for trial in trials
        if not trial.baseline
    }
    curves = {number: curve for number, curve in curves.items() if curve}
    last = min((len(curve) for curve in curves.values()), default=0)
    return {number: curve[last - 1] for number, curve in curves.items()}


def left_out(trials: Sequence[TrialRecord], space: Mapping[str, Dimension]) -> list[str]:
    """Settings that `importances` can't speak of, because only some evaluated trials have them."""
    quality = shared_quality(trials)
    used = [trial for trial in trials if trial.number in quality]
    return [key for key in space if not all(key in trial.assignments for trial in used)]


def importances(
    trials: Sequence[TrialRecord], space: Mapping[str, Dimension], *, seed: int = 0
) -> list[Importance]:
    """Shares of the settings that all trials have, the most important first.

    Of one such setting there is nothing to say: shares are relative, so that it would get the
    whole, whatever it does.

    Args:
        trials: of the sweep; the baseline is no point of the space and left out.
        space: dotted key -> dimension.
        seed: of the resampling and the forests.

    Returns:
        Empty where there are too few trials, q does not vary, or fewer than two settings do.
    """
    quality = shared_quality(trials)
    used = [trial for trial in trials if trial.number in quality]
    missing = left_out(trials, space)
    keys = [key for key in space if key not in missing]
    varying = [key for key in keys if len({repr(t.assignments[key]) for t in used}) > 1]
    if len(used) < MIN_TRIALS or len(varying) < 2 or len(set(quality.values())) < 2:
        return []
    generator = random.Random(seed)  # noqa: S311 - resampling, not security
    shares: dict[str, list[float]] = {key: [] for key in keys}
    for number in range(NUM_RESAMPLES):
        drawn = generator.choices(used, k=len(used))
        for key, share in _shares(drawn, quality, space, keys, seed + number).items():
            shares[key].append(share)
    found = [
        Importance(key, fmean(values), _quantile(values, 0.1), _quantile(values, 0.9))
        for key, values in shares.items()
        if values
    ]
    return sorted(found, key=lambda item: -item.share)


def _shares(
    drawn: Sequence[TrialRecord],
    quality: Mapping[int, float],
    space: Mapping[str, Dimension],
    keys: Sequence[str],
    seed: int,
) -> dict[str, float]:
    import optuna

    from raysched.tuning.proposals import distribution, encode

    if len({quality[trial.number] for trial in drawn}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    distributions = {key: distribution(space[key]) for key in keys}
    for trial in drawn:
        params = {key: encode(space[key], trial.assignments[key]) for key in keys}
        study.add_trial(
            optuna.trial.create_trial(
                value=quality[trial.number], params=params, distributions=distributions
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=NUM_TREES, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _quantile(values: Sequence[float], level: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(level * len(ordered)))]
