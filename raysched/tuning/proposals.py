"""Which settings to try next: Optuna's samplers by ask and tell, without Ray.

Choices and grids are searched by the index of the value, so that any JSON value can stand in a
space. What a trial tells the sampler is right for early stopping too: a pruned trial is told as
pruned, with its evaluations, never as a completed one; numbers that are not finite become a
finite penalty, so that the sampler learns to stay away.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from raysched.config.fields import same
from raysched.config.sweep import Dimension, SearchConfig
from raysched.tuning.records import Point, TrialRecord

# Proposals that repeat an earlier one, or that the run model refuses, are drawn again.
MAX_DRAWS = 200


class Proposals:
    """Proposes settings over a space, first the points that the user gave.

    Args:
        space: dotted key -> dimension.
        search: algorithm, seed, first points.
        allowed: whether the run model accepts the settings.
        past: trials of an earlier session; those that ended are told to the sampler.
    """

    def __init__(
        self,
        space: Mapping[str, Dimension],
        search: SearchConfig,
        *,
        allowed: Callable[[dict[str, Any]], bool] = lambda _: True,
        past: Iterable[TrialRecord] = (),
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space = dict(space)
        self._distributions = {key: distribution(dim) for key, dim in self._space.items()}
        self._allowed = allowed
        candidates = [record for record in past if not record.baseline]
        self._seen = {_fingerprint(record.assignments) for record in candidates}
        # Seeded by how many came before, so that a resumed search doesn't repeat its first draws.
        sampler = _sampler(search, search.seed + 7919 * len(candidates))
        self.study = optuna.create_study(direction="minimize", sampler=sampler)
        self._asked: dict[int, optuna.Trial] = {}
        fixed = [*search.points, *(_grid(self._space) if search.algorithm == "grid" else ())]
        # Points are tried in order: an earlier session has used up as many as it has trials.
        self._fixed = [dict(point) for point in fixed][len(candidates) :]
        self._only_fixed = search.algorithm == "grid"
        for record in candidates:
            if record.ended:
                self._replay(record)

    def ask(self, number: int) -> dict[str, Any] | None:
        """The settings of trial `number`; None when the space has nothing new to try."""
        while self._fixed:
            point = self._fixed.pop(0)
            draws = 1 if point.keys() >= self._space.keys() else MAX_DRAWS
            settings = self._first_new(number, draws, point)
            if settings is not None:
                return settings
        return None if self._only_fixed else self._first_new(number, MAX_DRAWS, {})

    def ask_again(self, record: TrialRecord) -> None:
        """Register an unfinished trial of an earlier session under its number and settings."""
        self.study.enqueue_trial(self._encode(record.assignments))
        self._asked[record.number] = self._ask_optuna()

    def tell(self, record: TrialRecord) -> None:
        """Tell the sampler how a trial ended; never raises on odd numbers."""
        trial = self._asked.pop(record.number, None)
        if trial is None:
            return
        state, value = self._outcome(record)
        if state is TrialState.PRUNED:
            for step, q in _intermediate(record.curve).items():
                trial.report(q, step)
        self.study.tell(trial, value, state=state)

    def _ask_optuna(self) -> optuna.Trial:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.study.ask(self._distributions)

    def _first_new(self, number: int, draws: int, point: dict[str, Any]) -> dict[str, Any] | None:
        """Draw what `point` leaves open until the settings are new and allowed."""
        for _ in range(draws):
            if point:
                self.study.enqueue_trial(self._encode(point))
            settings = self._draw(number)
            if settings is not None:
                return settings
        return None

    def _draw(self, number: int) -> dict[str, Any] | None:
        trial = self._ask_optuna()
        settings = {key: decode(dim, trial.params[key]) for key, dim in self._space.items()}
        fingerprint = _fingerprint(settings)
        if fingerprint in self._seen or not self._allowed(settings):
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        self._seen.add(fingerprint)
        self._asked[number] = trial
        return settings

    def _encode(self, point: Mapping[str, Any]) -> dict[str, Any]:
        return {key: encode(self._space[key], value) for key, value in point.items()}

    def _replay(self, record: TrialRecord) -> None:
        state, value = self._outcome(record)
        intermediate = _intermediate(record.curve) if state is TrialState.PRUNED else {}
        frozen: FrozenTrial = optuna.trial.create_trial(
            state=state,
            value=value if state is TrialState.COMPLETE else None,
            params=self._encode(record.assignments),
            distributions=self._distributions,
            intermediate_values=intermediate,
        )
        self.study.add_trial(frozen)

    def _outcome(self, record: TrialRecord) -> tuple[TrialState, float | None]:
        finite = record.q is not None and math.isfinite(record.q)
        if record.status == "finished" and finite:
            return TrialState.COMPLETE, record.q
        if record.status == "pruned" and _intermediate(record.curve):
            return TrialState.PRUNED, None
        penalty = self._penalty() if record.diverged or record.status == "finished" else None
        if penalty is None:
            return TrialState.FAIL, None
        return TrialState.COMPLETE, penalty

    def _penalty(self) -> float | None:
        """Worse than everything seen by the range of what was seen; None before any value."""
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        seen = [float(trial.value) for trial in done if trial.value is not None]
        if not seen:
            return None
        worst = max(seen)
        return worst + max(worst - min(seen), 0.1 * abs(worst), 1e-6)


def distribution(dimension: Dimension) -> BaseDistribution:
    """Optuna's distribution of a dimension."""
    kind, values = dimension.kind, dimension.values
    if kind == "uniform":
        return FloatDistribution(values[0], values[1])
    if kind == "loguniform":
        return FloatDistribution(values[0], values[1], log=True)
    if kind == "randint":
        # [low, high), as in Ray Tune.
        return IntDistribution(values[0], values[1] - 1)
    return CategoricalDistribution(range(len(values)))


def decode(dimension: Dimension, internal: Any) -> Any:
    """The setting that Optuna's parameter stands for."""
    return dimension.values[internal] if dimension.kind in ("choice", "grid") else internal


def encode(dimension: Dimension, value: Any) -> Any:
    """Optuna's parameter of a setting that the dimension contains."""
    if dimension.kind in ("choice", "grid"):
        return next(n for n, listed in enumerate(dimension.values) if same(listed, value))
    return value if dimension.kind == "randint" else float(value)


def _grid(space: Mapping[str, Dimension]) -> list[dict[str, Any]]:
    values = itertools.product(*(dimension.values for dimension in space.values()))
    return [dict(zip(space, point, strict=True)) for point in values]


def _sampler(search: SearchConfig, seed: int) -> optuna.samplers.BaseSampler:
    if search.algorithm == "tpe":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return optuna.samplers.TPESampler(
                n_startup_trials=search.startup_trials, seed=seed, constant_liar=True
            )
    return optuna.samplers.RandomSampler(seed=seed)


def _intermediate(curve: Iterable[Point]) -> dict[int, float]:
    finite = (point for point in curve if math.isfinite(point.q))
    return {round(point.forward_equivalents): point.q for point in finite}


def _fingerprint(assignments: Mapping[str, Any]) -> str:
    return json.dumps(dict(assignments), sort_keys=True)
