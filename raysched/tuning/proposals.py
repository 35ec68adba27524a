"""Which settings to try next: Optuna's samplers by ask and tell, without Ray.

Choices and grids are searched by the index of the value, so that any JSON value can stand in a
space. What a trial tells the sampler is right for early stopping too: a pruned trial is told as
pruned, with its evaluations, never as a completed one; numbers that are not finite become a
finite penalty, so that the sampler learns to stay away.
"""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from raysched.config.structure import Structure, value_at
from raysched.config.sweep import Dimension, SearchConfig
from raysched.tuning.records import Point, TrialRecord

# Proposals that repeat an earlier one, or that the run model refuses, are drawn again.
MAX_DRAWS = 200
# So many by the sampler, the others at random.
MODEL_DRAWS = 10


def quality_loss(record: TrialRecord) -> tuple[float, ...] | None:
    """q of a finished trial."""
    return None if record.q is None else (record.q,)


class Proposals:
    """Proposes settings over a space, first the points that the user gave.

    Args:
        space: dotted key -> dimension, or a structure with conditions and constraints.
        search: algorithm, seed, first points.
        losses: what a finished trial is worth, lower is better; default: its q.
        num_losses: how many numbers that are.
        allowed: whether the run model accepts the settings.
        past: trials of an earlier session; those that ended are told to the sampler.
    """

    def __init__(
        self,
        space: Mapping[str, Dimension] | Structure,
        search: SearchConfig,
        *,
        losses: Callable[[TrialRecord], Sequence[float] | None] = quality_loss,
        num_losses: int = 1,
        allowed: Callable[[dict[str, Any]], bool] = lambda _: True,
        past: Iterable[TrialRecord] = (),
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._structure = space if isinstance(space, Structure) else Structure(space, {})
        self._space = dict(self._structure.space)
        self._distributions = {key: distribution(dim) for key, dim in self._space.items()}
        self._losses, self._num_losses = losses, num_losses
        self._allowed = allowed
        candidates = [record for record in past if not record.baseline]
        self._seen = {_fingerprint(record.assignments) for record in candidates}
        # Seeded by how many came before, so that a resumed search doesn't repeat its first draws.
        sampler = _sampler(search, search.seed + 7919 * len(candidates))
        directions = ["minimize"] * num_losses
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.study = optuna.create_study(directions=directions, sampler=sampler)
        self._random = random.Random(search.seed)  # noqa: S311 - no secret
        self._asked: dict[int, optuna.Trial] = {}
        # What trials really were worth, penalties left out: each would raise the next one's.
        self._worth: list[Sequence[float]] = []
        # Infeasible trials that came before any value: a penalty needs something to be worse than.
        self._owed: list[optuna.Trial] = []
        # Points are tried in order: an earlier session has used up as many as it has trials.
        self._fixed = [dict(point) for point in search.points][len(candidates) :]
        self._listed = _listed(self._structure, search)
        ended = [record for record in candidates if record.ended]
        # Infeasible ones last: their penalty is worse than all values, which must be known.
        for record in sorted(ended, key=self._is_infeasible):
            self._replay(record)

    def ask(self, number: int) -> dict[str, Any] | None:
        """The settings of trial `number`; None when the space has nothing new to try."""
        while self._fixed:
            point = self._fixed.pop(0)
            draws = 1 if point.keys() >= self._space.keys() else MAX_DRAWS
            settings = self._first_new(number, draws, point)
            if settings is not None:
                return settings
        if self._listed is None:
            return self._first_new(number, MAX_DRAWS, {})
        for point in self._listed:
            if _fingerprint(point) not in self._seen:
                settings = self._first_new(number, 1, point)
                if settings is not None:
                    return settings
        return None

    def ask_again(self, record: TrialRecord) -> None:
        """Register an unfinished trial of an earlier session under its number and settings."""
        self.study.enqueue_trial(self._encode(record.assignments))
        self._asked[record.number] = self._ask_optuna()[0]

    def tell(self, record: TrialRecord) -> None:
        """Tell the sampler how a trial ended; never raises on odd numbers."""
        trial = self._asked.pop(record.number, None)
        if trial is None:
            return
        if self._is_infeasible(record) and self._penalty() is None:
            self._owed.append(trial)
            return
        state, values = self._outcome(record)
        if state is TrialState.PRUNED and self._num_losses == 1:
            # With several objectives Optuna takes no evaluations on the way.
            for step, q in _intermediate(record.curve).items():
                trial.report(q, step)
        self.study.tell(trial, values, state=state)
        self._pay_debts()

    def _ask_optuna(self) -> tuple[optuna.Trial, dict[str, Any]]:
        """A trial of Optuna's, asked for the settings that its own conditions leave in."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = self.study.ask()
            settings = self._structure.choose(
                lambda key: decode(
                    self._space[key], _suggest(trial, key, self._distributions[key])
                )
            )
        return trial, settings

    def _first_new(self, number: int, draws: int, point: dict[str, Any]) -> dict[str, Any] | None:
        """Draw what `point` leaves open until the settings are new and allowed."""
        for draw in range(draws):
            if draw < MODEL_DRAWS or self._listed is not None:
                drawn = point
            else:
                # A model that is sure of its best may name it for ever.
                drawn = self._structure.random(self._random, point)
                if _fingerprint(drawn) in self._seen:
                    continue
            if drawn:
                self.study.enqueue_trial(self._encode(drawn))
            settings = self._draw(number, point)
            if settings is not None:
                return settings
        return None

    def _draw(self, number: int, point: Mapping[str, Any]) -> dict[str, Any] | None:
        trial, settings = self._ask_optuna()
        fingerprint = _fingerprint(settings)
        refused = (
            fingerprint in self._seen
            # What else was drawn left out a setting of the point.
            or not point.keys() <= settings.keys()
            or self._structure.broken(settings) is not None
            or not self._allowed(settings)
        )
        if refused:
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        self._seen.add(fingerprint)
        self._asked[number] = trial
        return settings

    def _encode(self, point: Mapping[str, Any]) -> dict[str, Any]:
        return {key: encode(self._space[key], value) for key, value in point.items()}

    def _replay(self, record: TrialRecord) -> None:
        state, values = self._outcome(record)
        one = self._num_losses == 1
        pruned = state is TrialState.PRUNED and one
        frozen: FrozenTrial = optuna.trial.create_trial(
            state=state,
            values=list(values) if values is not None else None,
            params=self._encode(record.assignments),
            distributions={key: self._distributions[key] for key in record.assignments},
            intermediate_values=_intermediate(record.curve) if pruned else {},
        )
        self.study.add_trial(frozen)

    def _outcome(self, record: TrialRecord) -> tuple[TrialState, Sequence[float] | None]:
        """What the sampler is told of a trial that ended; real values are kept for penalties."""
        losses = self._losses(record) if record.status == "finished" else None
        if losses is not None and all(map(math.isfinite, losses)):
            self._worth.append(losses)
            return TrialState.COMPLETE, losses
        if record.status == "pruned" and _intermediate(record.curve):
            return TrialState.PRUNED, None
        penalty = self._penalty() if self._is_infeasible(record) else None
        if penalty is None:
            return TrialState.FAIL, None
        return TrialState.COMPLETE, penalty

    def _is_infeasible(self, record: TrialRecord) -> bool:
        """Whether its settings are to be stayed away from: NaN, or more memory than there is.

        A trial that failed for another reason, or lacks an objective, says nothing about them.
        """
        if record.infeasible is not None or _no_number(record):
            return True
        losses = self._losses(record) if record.status == "finished" else None
        return losses is not None and not all(map(math.isfinite, losses))

    def _pay_debts(self) -> None:
        penalty = self._penalty()
        if penalty is not None:
            for trial in self._owed:
                self.study.tell(trial, penalty, state=TrialState.COMPLETE)
            self._owed.clear()

    def _penalty(self) -> list[float] | None:
        """Worse than everything seen by the range of what was seen; None before any value."""
        if not self._worth:
            return None
        return [
            max(column) + max(max(column) - min(column), 0.1 * abs(max(column)), 1e-6)
            for column in zip(*self._worth, strict=True)
        ]


def distribution(dimension: Dimension) -> BaseDistribution:
    """Optuna's distribution of a dimension."""
    kind, values = dimension.kind, dimension.values
    if kind in ("uniform", "loguniform"):
        return FloatDistribution(values[0], values[1], log=kind == "loguniform")
    if kind == "quniform":
        return FloatDistribution(values[0], values[1], step=values[2])
    if kind in ("randint", "lograndint"):
        # [low, high), as in Ray Tune.
        return IntDistribution(values[0], values[1] - 1, log=kind == "lograndint")
    if kind == "qrandint":
        return IntDistribution(values[0], values[1], step=values[2])
    return CategoricalDistribution(range(len(values)))


def decode(dimension: Dimension, internal: Any) -> Any:
    """The setting that Optuna's parameter stands for."""
    if dimension.kind == "quniform":
        low, _, step = dimension.values
        return dimension.at_step(round((internal - low) / step))
    return dimension.values[internal] if dimension.kind in ("choice", "grid") else internal


def encode(dimension: Dimension, value: Any) -> Any:
    """Optuna's parameter of a setting that the dimension contains."""
    if dimension.kind in ("choice", "grid"):
        return next(n for n, listed in enumerate(dimension.values) if same(listed, value))
    return value if dimension.kind in ("randint", "lograndint", "qrandint") else float(value)


def _suggest(trial: optuna.Trial, key: str, law: BaseDistribution) -> Any:
    if isinstance(law, FloatDistribution):
        return trial.suggest_float(key, law.low, law.high, step=law.step, log=law.log)
    if isinstance(law, IntDistribution):
        return trial.suggest_int(key, law.low, law.high, step=law.step, log=law.log)
    assert isinstance(law, CategoricalDistribution), "the three kinds that `distribution` makes"
    return trial.suggest_categorical(key, law.choices)


def _listed(structure: Structure, search: SearchConfig) -> Iterator[dict[str, Any]] | None:
    """The points of a search that no model guides, in order; None where a sampler draws."""
    if search.algorithm == "grid":
        return structure.every()
    if search.algorithm == "quasi_random":
        return _sobol(structure, search.seed)
    return None


def _sobol(structure: Structure, seed: int) -> Iterator[dict[str, Any]]:
    """Scrambled Sobol points (Owen 1998), over choices and ranges alike; at most 2^13."""
    from scipy.stats import qmc

    keys = list(structure.space)
    sobol = qmc.Sobol(len(keys), scramble=True, rng=seed)
    for _ in range(2**3):
        for row in sobol.random(2**10):
            values = {k: value_at(structure.space[k], u) for k, u in zip(keys, row, strict=True)}
            yield structure.choose(values.__getitem__)


def _sampler(search: SearchConfig, seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if search.algorithm == "tpe":
            return optuna.samplers.TPESampler(
                n_startup_trials=search.startup_trials, seed=seed, constant_liar=True
            )
        if search.algorithm == "gp":
            return optuna.samplers.GPSampler(n_startup_trials=search.startup_trials, seed=seed)
        if search.algorithm == "nsga2":
            population = search.population or max(4, search.num_samples // 4)
            return optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


def _no_number(record: TrialRecord) -> bool:
    return record.status == "finished" and (record.q is None or not math.isfinite(record.q))


def _intermediate(curve: Iterable[Point]) -> dict[int, float]:
    finite = (point for point in curve if math.isfinite(point.q))
    return {round(point.forward_equivalents): point.q for point in finite}


def _fingerprint(assignments: Mapping[str, Any]) -> str:
    return json.dumps(dict(assignments), sort_keys=True)
