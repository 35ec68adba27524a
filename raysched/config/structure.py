"""Which searched settings go together: conditions on single dimensions, constraints between them.

A dimension with a condition (`when`) is searched in a trial only where all the settings that it
names have fitting values; a condition on a searched setting that the trial itself leaves out does
not hold. What a trial leaves out keeps the base run's value and is no part of its settings, so two
trials that differ only there are the same trial. A constraint that names a left-out setting does
not apply.
"""

from __future__ import annotations

import graphlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raysched.config.constraints import Constraint, parse_constraint
from raysched.config.fields import RUN, is_number, same
from raysched.config.run import RunConfig
from raysched.config.sweep import Dimension, SweepConfig

Settings = dict[str, Any]
# What a trial does against exposure bias; plain training has none of it.
METHOD = frozenset(
    {"exposure", "scheduled_sampling", "input_perturbation", "mixflow", "dream"}
    | {"self_correction", "defar"}
)


@dataclass(frozen=True)
class Structure:
    """A space with what connects its dimensions.

    Attributes:
        space: dotted key -> dimension.
        fixed: resolved values of the base run's settings, by dotted key.
        constraints: what every trial must fulfil.
    """

    space: Mapping[str, Dimension]
    fixed: Mapping[str, Any]
    constraints: tuple[Constraint, ...] = ()

    @cached_property
    def order(self) -> tuple[str, ...]:
        """The keys, each after those that its condition names.

        Raises:
            graphlib.CycleError: conditions depend on each other.
        """
        graph = {
            key: [name for name in dimension.conditions if name in self.space]
            for key, dimension in self.space.items()
        }
        return tuple(graphlib.TopologicalSorter(graph).static_order())

    def active(self, key: str, chosen: Mapping[str, Any]) -> bool:
        """Whether a dimension is searched, given the settings chosen before it in `order`."""
        for name, test in self.space[key].conditions.items():
            if name in self.space:
                if name not in chosen or not matches(test, chosen[name]):
                    return False
            elif not matches(test, self.fixed.get(name)):
                return False
        return True

    def choose(self, pick: Callable[[str], Any]) -> Settings:
        """One combination: `pick` is asked for the value of every active dimension."""
        chosen: Settings = {}
        for key in self.order:
            if self.active(key, chosen):
                chosen[key] = pick(key)
        # In the order of the file, which is how users know it.
        return {key: chosen[key] for key in self.space if key in chosen}

    def broken(self, settings: Mapping[str, Any]) -> Constraint | None:
        """The first constraint that a combination breaks."""
        for constraint in self.constraints:
            left_out = any(n in self.space and n not in settings for n in constraint.names)
            if not left_out and not constraint.holds({**self.fixed, **settings}):
                return constraint
        return None

    def every(self) -> Iterator[Settings]:
        """All combinations of a space of lists, in order, constraints fulfilled."""

        def walk(chosen: Settings, rest: Sequence[str]) -> Iterator[Settings]:
            if not rest:
                yield {key: chosen[key] for key in self.space if key in chosen}
                return
            key = rest[0]
            if not self.active(key, chosen):
                yield from walk(chosen, rest[1:])
                return
            for value in self.space[key].values:
                yield from walk({**chosen, key: value}, rest[1:])

        return (settings for settings in walk({}, self.order) if self.broken(settings) is None)

    def random(self, generator: random.Random, point: Mapping[str, Any] | None = None) -> Settings:
        """One combination at random, constraints not looked at; `point` gives some values."""
        given = point or {}
        return self.choose(
            lambda key: (
                given[key] if key in given else value_at(self.space[key], generator.random())
            )
        )

    def beside_the_method(self) -> Structure:
        """The part of the space that plain training has, too: optimizer, network, batch, …

        Constraints between such settings stay; conditions on the method leave a setting out.
        """
        space: dict[str, Dimension] = {}
        for key in self.order:
            if key.partition(".")[0] not in METHOD and all(
                name in space or (name not in self.space and name.partition(".")[0] not in METHOD)
                for name in self.space[key].conditions
            ):
                space[key] = self.space[key]
        left_out = self.space.keys() - space.keys()
        constraints = tuple(c for c in self.constraints if not c.names & left_out)
        return Structure(space, self.fixed, constraints)


def structure_of(sweep: SweepConfig, base: RunConfig) -> Structure:
    """The structure of a checked sweep around its base run."""
    constraints = tuple(parse_constraint(text) for text in sweep.constraints)
    return Structure(sweep.space, fixed_values(base), constraints)


def fixed_values(config: RunConfig) -> dict[str, Any]:
    """The resolved values of a run by dotted key, in JSON types."""
    dumped = config.model_dump(mode="json")
    values = {}
    for path in RUN.leaves:
        level: Any = dumped
        for part in path.split("."):
            level = level[part]
        values[path] = level
    return values


def matches(test: Any, value: Any) -> bool:
    """Whether a value fits a condition: a value, a list of them, or `{min: …, max: …}`."""
    if isinstance(test, Mapping):
        if not is_number(value):
            return False
        return bool(test.get("min", -math.inf) <= value <= test.get("max", math.inf))
    if isinstance(test, list | tuple):
        return any(same(value, listed) for listed in test)
    return same(value, test)


def value_at(dimension: Dimension, u: float) -> Any:
    """The value at a place of the unit interval, uniform or by its logarithm.

    Args:
        dimension: any kind.
        u: in [0, 1).
    """
    kind, values = dimension.kind, dimension.values
    if kind in ("choice", "grid"):
        return values[min(int(u * len(values)), len(values) - 1)]
    low, high = values[:2]
    if kind == "uniform":
        return low + u * (high - low)
    if kind in ("quniform", "qrandint"):
        steps = round((high - low) / values[2]) + 1
        return dimension.at_step(min(int(u * steps), steps - 1))
    if kind == "randint":
        return min(low + int(u * (high - low)), high - 1)
    drawn = math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
    return min(max(int(drawn), low), high - 1) if kind == "lograndint" else drawn
