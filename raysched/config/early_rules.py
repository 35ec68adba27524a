"""Early stopping that can't be fair: before a ramp has ended, or between several objectives."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

from raysched.config.entries import Finding
from raysched.config.run import RunConfig
from raysched.config.structure import Structure, structure_of, value_at
from raysched.config.sweep import Dimension, SweepConfig

SS = "scheduled_sampling."
# Mean offset over K at most; round((1 - v^2) K) has 0.707 for K = 1 and two thirds for large K.
MEAN_SHARE = {"uniform": 1 / 2, "biased_early": 1 / 3, "biased_late": 0.7072}
MATTERS = {
    "exposure",
    "training.batch_size",
    "training.gradient_accumulation",
    *(SS + name for name in ("max_step_offset", "strategy", "grid", "sampler", "probability")),
    *(SS + name for name in ("guidance_scale", "jump_gradient", "reflexflow", "reflexflow_alpha")),
    *(SS + name for name in ("ramp_steps", "offset_ramp_steps", "start_step")),
    *(SS + name for name in ("prob_start", "prob_end", "reuse", "bucket")),
}
MAX_CORNERS, NUM_RANDOM = 20_000, 500


def early_mistakes(
    sweep: SweepConfig, config: RunConfig, budget: float, source: str, *, sound: bool
) -> list[Finding]:
    """What is wrong with a sweep's early stopping.

    Args:
        sweep: the sweep, its space by dotted keys.
        config: its base run.
        budget: F.
        source: its file.
        sound: whether combinations of its space can be drawn: it has no mistake of its own.
    """
    early, found = sweep.early_stopping, []

    def refuse(key: str, text: str) -> None:
        found.append(Finding(source, f"early_stopping.{key}", text))

    if sweep.objective.several and early.kind not in ("mo_asha", "none"):
        refuse("kind", f"must be mo_asha or none with objective.several, got {early.kind}")
    if not sweep.objective.several and early.kind == "mo_asha":
        refuse("kind", "mo_asha needs objective.several; with one objective use asha")
    if early.kind == "none" or not sound:
        return found
    needed, end = ramp_end(sweep, config)
    if early.grace_fraction * budget < needed:
        refuse(
            "grace_fraction",
            f"must not end before the ramp does (step {end}, up to {needed:,.0f} forward "
            f"equivalents, {needed / budget:.2f} of the budget), got {early.grace_fraction:g}: "
            "raise it, shorten the ramp, or raise the budget",
        )
    return found


def ramp_end(sweep: SweepConfig, config: RunConfig) -> tuple[float, int]:
    """The most compute that a trial of the space has spent when its ramps end, and that step.

    Looked for among combinations that trials could really have, conditions and constraints
    fulfilled: those of the ends of what matters here, and random ones.

    Args:
        sweep: its space may search the ramp.
        config: the base run, for what the space leaves alone.

    Returns:
        Forward equivalents (0 without a ramp), and the optimizer step.
    """
    structure = structure_of(sweep, config)
    fixed = structure.fixed
    generator = random.Random(0)  # noqa: S311 - no secret
    drawn = (structure.random(generator) for _ in range(NUM_RANDOM))
    possible = (point for point in drawn if structure.broken(point) is None)
    ends = (_ends_only(structure, generator) for _ in range(NUM_RANDOM))
    points = itertools.chain(
        itertools.islice(_corners(structure), MAX_CORNERS),
        possible,
        (point for point in ends if structure.broken(point) is None),
    )
    return max((_ramp_cost({**fixed, **point}) for point in points), default=(0.0, 0))


def _corners(structure: Structure) -> Iterator[dict[str, Any]]:
    """Ends of the settings that a ramp's cost depends on, and of those their conditions name."""
    needed = {key for key in structure.space if key in MATTERS}
    while more := {
        name
        for key in needed
        for name in structure.space[key].conditions
        if name in structure.space and name not in needed
    }:
        needed |= more
    space = {key: _both_ends(structure.space[key]) for key in structure.space if key in needed}
    constraints = tuple(
        c for c in structure.constraints if not c.names & (structure.space.keys() - needed)
    )
    return Structure(space, structure.fixed, constraints).every()


def _ends_only(structure: Structure, generator: random.Random) -> dict[str, Any]:
    space = structure.space
    return structure.choose(lambda key: generator.choice(_both_ends(space[key]).values))


def _both_ends(dimension: Dimension) -> Dimension:
    listed = dimension.kind in ("choice", "grid")
    low, high = value_at(dimension, 0.0), value_at(dimension, 1.0)
    values = dimension.values if listed else (low,) if low == high else (low, high)
    return Dimension(choice=values, when=dict(dimension.conditions) or None)


def _ramp_cost(run: Mapping[str, Any]) -> tuple[float, int]:
    """Forward equivalents of a run until its ramps have ended, at most, and the step.

    Until `start_step` the chance is that of the ramp's start; in between its mean is that of the
    two ends. Clamping and windows, which shorten rollouts, are left out.
    """
    rollout = {key.removeprefix(SS): value for key, value in run.items() if key.startswith(SS)}
    ramp = max(rollout["ramp_steps"], rollout["offset_ramp_steps"])
    if not ramp or run["exposure"] != "scheduled_sampling" or not rollout["max_step_offset"]:
        return 0.0, 0
    rolled = _rolled_cost(rollout)
    before, after = rollout["prob_start"], rollout["prob_end"]
    if not rollout["ramp_steps"]:
        before = after = rollout["probability"]
    start = rollout["start_step"]
    per_sample = start * (3 + before * rolled) + ramp * (3 + (before + after) / 2 * rolled)
    padded = start * _padded_rows(run, before, before) + ramp * _padded_rows(run, before, after)
    return run["training.batch_size"] * per_sample + padded, int(start + ramp)


def _rolled_cost(rollout: Mapping[str, Any]) -> float:
    """Forward equivalents of a rolled sample beside the 3 that every sample costs."""
    jump = rollout["grid"] == "jump"
    price = 3 if jump and rollout["jump_gradient"] else 1
    passed = 0.0
    # A jump is one step and passes no states.
    if rollout["reuse"] != "last" and not jump:
        offset = rollout["max_step_offset"]
        most = offset if rollout["reuse"] == "all" else min(rollout["reuse"], offset)
        passed = _passed_states(rollout["strategy"], offset, most)
    return price * _solver_rows(rollout) + _clean_rows(rollout) + 3 * passed


def _solver_rows(rollout: Mapping[str, Any]) -> float:
    """Forwards that the solver makes of a rolled sample, on average."""
    steps = MEAN_SHARE[rollout["strategy"]] * rollout["max_step_offset"]
    forwards = 4 if rollout["sampler"] == "rk4" else 1
    forwards *= 2 if rollout["guidance_scale"] != 1 else 1
    return forwards * (1.0 if rollout["grid"] == "jump" else steps)


def _clean_rows(rollout: Mapping[str, Any]) -> int:
    return int(rollout["reflexflow"] is not False and rollout["reflexflow_alpha"] != 0)


@functools.lru_cache(maxsize=4096)
def _passed_states(strategy: str, offset: int, most: int) -> float:
    """Mean of min(k, most) - 1, or 0 for k = 0: what `reuse` trains on beside the last state."""
    return sum(_chance_of_at_least(strategy, offset, j) for j in range(2, most + 1))


def _chance_of_at_least(strategy: str, offset: int, j: int) -> float:
    """P(k >= j) before clamping, 1 <= j <= K; `offset_law` has it for tensors."""
    if strategy == "uniform":
        return (offset + 1 - j) / (offset + 1)
    share = (j - 0.5) / offset
    return 1 - math.sqrt(share) if strategy == "biased_early" else math.sqrt(1 - share)


def _padded_rows(run: Mapping[str, Any], before: float, after: float) -> float:
    """Rows that fill the calls of an optimizer step up to multiples of `bucket`, roughly at most.

    A worker makes as many calls as the longest rollout has, or as its rows need in full batches.
    Calls that are not full waste what they lack, others half a bucket on average.

    Args:
        run: resolved values by dotted key.
        before: the chance of a rollout at the beginning of some optimizer steps.
        after: at their end.
    """
    rollout = {key.removeprefix(SS): value for key, value in run.items() if key.startswith(SS)}
    bucket, chance = rollout["bucket"], max(before, after)
    if bucket == 1 or not chance:
        return 0.0
    longest = 1 if rollout["grid"] == "jump" else rollout["max_step_offset"]
    longest *= 4 if rollout["sampler"] == "rk4" else 1
    rows = _solver_rows(rollout) + _clean_rows(rollout)
    full = run["training.gradient_accumulation"] * chance * rows + 1
    calls = max(run["scaling.num_workers"], 1) * max(longest, full)
    filled = run["training.batch_size"] * (before + after) / 2 * rows
    return float(max(calls * bucket - filled, calls * (bucket - 1) / 2))
