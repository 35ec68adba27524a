"""The budget of a sweep, and its warnings."""

from __future__ import annotations

import itertools

from raysched.config.entries import Entries
from raysched.config.fields import RUN
from raysched.config.loading import Loaded, Written, warnings_of
from raysched.config.run import RunConfig
from raysched.config.structure import structure_of
from raysched.config.sweep import SweepConfig
from raysched.errors import ConfigError

# Combinations of a grid are counted so far.
MAX_COUNTED = 100_000


def sweep_budget(sweep: SweepConfig, base: RunConfig | Loaded) -> float:
    """F, the compute that every trial gets, in forward equivalents.

    Args:
        sweep: whose budget comes first.
        base: else its budget; an optimizer step counts 3 per sample of the batch.

    Raises:
        ConfigError: the budget is in seconds, which compares machines rather than methods.
    """
    config = base.config if isinstance(base, Loaded) else base
    budget = config.training.budget
    if sweep.budget_forward_equivalents is not None:
        return float(sweep.budget_forward_equivalents)
    if budget.forward_equivalents is not None:
        return float(budget.forward_equivalents)
    if budget.steps is not None:
        return float(budget.steps * 3 * config.training.batch_size)
    raise ConfigError(
        "budget_forward_equivalents: must be given, or training.budget in steps or "
        f"forward_equivalents; got training.budget.seconds {budget.seconds:g}, but trials are "
        "compared at equal compute"
    )


def sweep_warnings(
    sweep: SweepConfig, config: RunConfig, entries: Entries, written: Written, source: str
) -> list[str]:
    """The base's warnings that no searched setting may lift, and the sweep's own."""
    found = warnings_of(config, entries, spelled_out=written.spelled_out)
    lines = [f.line for f in found if not f.involved & set(sweep.space)]
    lines += [
        f"{source}: overrides.{key}: has no effect: the space searches it"
        for key in sweep.overrides
        if RUN.resolve(key) in sweep.space
    ]
    grid = "scheduled_sampling.grid"
    finest = config.scheduled_sampling.grid == config.noise_schedule.num_train_timesteps
    if finest and "scheduled_sampling.sampler" in sweep.space and grid not in sweep.space:
        lines.append(
            f"{source}: space.scheduled_sampling.sampler: on the training grid all solvers "
            f"agree; search {grid} too, or set a coarser one"
        )
    return [*lines, *_grid_left(sweep, config, source)]


def _grid_left(sweep: SweepConfig, config: RunConfig, source: str) -> list[str]:
    """A warning where a grid is larger than the search: only its first combinations are tried."""
    if sweep.search.algorithm != "grid":
        return []
    wanted = sweep.search.num_samples
    count = sum(1 for _ in itertools.islice(structure_of(sweep, config).every(), MAX_COUNTED))
    if count <= wanted:
        return []
    number = f"{count}" if count < MAX_COUNTED else f"{count} and more"
    return [
        f"{source}: search.num_samples: only the first {wanted} of the grid's combinations are "
        f"tried, of {number}; raise it to try every one, or draw from them by another "
        "search.algorithm (random, tpe)"
    ]
