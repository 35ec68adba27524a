"""Hypervolume of MO-ASHA against NSGA-II without pruning, at equal compute.

Three problems whose fronts are known (ZDT1, ZDT2 and ZDT3 in six variables), as trials: after the
share s of its budget a trial shows f plus what it has not learned yet, (1 - s) c(x), where c is
the trial's own, so that early values mislead a little. Both searchers are Optuna's NSGA-II; one
trains everything to the end, the other prunes at rungs. Both get the same compute, and only
trials trained to the end count.

What a pruned trial tells NSGA-II (`--told`):

  fail       nothing: a trial that was not measured at the budget has no values (the default)
  rung       its values at the rung as if complete, which rewards being stopped where compute is an
             objective: what one gets from a scheduler beside a searcher that don't know each other

    python benchmarks/mo_asha.py --json
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import optuna

from raysched.tuning.mo_asha import ParetoHalving
from raysched.tuning.pareto import hypervolume

Values = tuple[float, ...]
NUM_VARIABLES, POPULATION = 6, 20
CORNER = (1.1, 6.0)


@dataclass(frozen=True)
class Problem:
    """Two objectives, and how far an unfinished trial is from them.

    Attributes:
        final: x -> values at the budget.
        unlearned: x -> what is added at share 0 of the budget.
        corner: reference of the hypervolume.
        front: first objective -> second, on the known front.
    """

    final: Callable[[list[float]], Values]
    unlearned: Callable[[list[float]], float]
    corner: Values = CORNER
    front: tuple[Values, ...] = ()

    def at(self, x: list[float], share: float) -> Values:
        """What a trial shows after a share of its budget."""
        missing = (1 - share) * self.unlearned(x)
        return tuple(value + missing for value in self.final(x))


@dataclass
class Found:
    """A search.

    Attributes:
        proposals: what was tried.
        complete: values of the trials that were trained to the end.
        spent: whole trainings' worth of compute.
        stopped_on_front: trials that were stopped early and that the searcher takes for its best.
    """

    proposals: list[list[float]] = field(default_factory=list)
    stopped_on_front: int = 0
    complete: list[Values] = field(default_factory=list)
    spent: float = 0.0


def _zdt(shape: Callable[[float, float], float]) -> Callable[[list[float]], Values]:
    def final(x: list[float]) -> Values:
        g = 1 + 9 * fmean(x[1:])
        return x[0], g * shape(x[0], g)

    return final


def _own(x: list[float]) -> float:
    """Curves differ between trials: 1 to 2, a hash of the settings."""
    return 1 + abs(math.sin(37 * sum((i + 1) * v for i, v in enumerate(x))))


def _zdt3(f: float, g: float) -> float:
    return 1 - math.sqrt(f / g) - f / g * math.sin(10 * math.pi * f)


def _front(shape: Callable[[float, float], float]) -> tuple[Values, ...]:
    return tuple((i / 2000, shape(i / 2000, 1.0)) for i in range(2001))


SHAPES: dict[str, Callable[[float, float], float]] = {
    "zdt1": lambda f, g: 1 - math.sqrt(f / g),
    "zdt2": lambda f, g: 1 - (f / g) ** 2,
    "zdt3": _zdt3,
}
PROBLEMS = {
    name: Problem(_zdt(shape), _own, front=_front(shape)) for name, shape in SHAPES.items()
}
# Quality and compute: who is bad (x0 > 0.5) is stopped, and has then cost little.
PROBLEMS["trap"] = Problem(lambda x: ((3.0 if x[0] > 0.5 else 0.5) + fmean(x), 1.0), lambda x: 0.0)


def search(
    problem: Problem, *, seed: int, prune: bool, budget: float, told: str = "fail",
    grace: float = 1 / 9, factor: float = 3.0,
) -> Found:  # fmt: skip
    """Search until `budget` whole trainings' worth of compute is spent."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    rule = ParetoHalving(grace=grace, budget=1.0, factor=factor)
    found, stopped = Found(), set()
    # Past the end nothing is begun; both may overshoot by less than one training.
    while found.spent < budget:
        trial = study.ask()
        x = [trial.suggest_float(f"x{i}", 0.0, 1.0) for i in range(NUM_VARIABLES)]
        found.proposals.append(x)
        rungs = rule.milestones if prune else []
        stopped_at = next(
            (s for s in rungs if rule.stops(trial.number, s, problem.at(x, s))), None
        )
        found.spent += stopped_at or 1.0
        if stopped_at is not None:
            stopped.add(trial.number)
        if stopped_at is None:
            found.complete.append(problem.at(x, 1.0))
            study.tell(trial, problem.at(x, 1.0))
        elif told == "rung":
            # As a cost objective has it: the compute spent is the second value.
            study.tell(trial, (problem.at(x, stopped_at)[0], stopped_at))
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    found.stopped_on_front = sum(t.number in stopped for t in study.best_trials)
    return found


def compare(name: str, *, seeds: int, budget: float, factor: float) -> dict[str, Any]:
    """One problem: mean hypervolume of both, as shares of the front's."""
    problem = PROBLEMS[name]
    whole = hypervolume(problem.front, problem.corner)
    rows: dict[str, list[float]] = {"nsga2": [], "mo_asha": []}
    for seed in range(seeds):
        random.seed(seed)
        for key, prune in (("nsga2", False), ("mo_asha", True)):
            found = search(
                problem, seed=seed, prune=prune, budget=budget, factor=factor, grace=factor**-2
            )
            rows[key].append(hypervolume(found.complete, problem.corner) / whole)
    ahead = sum(a >= b for a, b in zip(rows["mo_asha"], rows["nsga2"], strict=True))
    means = {key: round(fmean(values), 4) for key, values in rows.items()}
    return {"problem": name, **means, "ahead": ahead, "seeds": seeds, "budget": budget}


def main() -> None:
    """Print a row per problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=float, default=100.0, help="whole trainings")
    parser.add_argument("--factor", type=float, default=3.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [
        compare(name, seeds=options.seeds, budget=options.budget, factor=options.factor)
        for name in SHAPES
    ]
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
