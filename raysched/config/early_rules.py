"""Early stopping that can't be fair: before a ramp has ended, or between several objectives."""

from __future__ import annotations

from raysched.config.entries import Finding
from raysched.config.run import RunConfig
from raysched.config.sweep import SweepConfig

SS = "scheduled_sampling."


def early_mistakes(
    sweep: SweepConfig, config: RunConfig, budget: float, source: str
) -> list[Finding]:
    """What is wrong with a sweep's early stopping.

    Args:
        sweep: the sweep, its space by dotted keys.
        config: its base run.
        budget: F.
        source: its file.
    """
    early, found = sweep.early_stopping, []

    def refuse(key: str, text: str) -> None:
        found.append(Finding(source, f"early_stopping.{key}", text))

    if sweep.objective.several and early.kind not in ("mo_asha", "none"):
        refuse("kind", f"must be mo_asha or none with objective.several, got {early.kind}")
    if not sweep.objective.several and early.kind == "mo_asha":
        refuse("kind", "mo_asha needs objective.several; with one objective use asha")
    needed, end = ramp_end(sweep, config)
    if early.kind != "none" and early.grace_fraction * budget < needed:
        refuse(
            "grace_fraction",
            f"must not end before the ramp does (step {end}, up to {needed:,.0f} forward "
            f"equivalents, {needed / budget:.2f} of the budget), got {early.grace_fraction:g}: "
            "raise it, shorten the ramp, or raise the budget",
        )
    return found


def ramp_end(sweep: SweepConfig, config: RunConfig) -> tuple[float, int]:
    """The most compute that a trial of the space has spent when its ramps end, and that step.

    Args:
        sweep: its space may search the ramp.
        config: the base run, for what the space leaves alone.

    Returns:
        Forward equivalents (0 without a ramp), and the optimizer step. Until `start_step` the
        chance is that of the ramp's start; in between its mean is that of the two ends.
    """

    def largest(name: str) -> float:
        dimension = sweep.space.get(SS + name)
        values = dimension.values if dimension else [getattr(config.scheduled_sampling, name)]
        numbers = [float(v) for v in values if isinstance(v, int | float)]
        return max(numbers, default=0.0)

    ramp = max(largest("ramp_steps"), largest("offset_ramp_steps"))
    if not ramp or not _rolls(sweep, config):
        return 0.0, 0
    solver = sweep.space.get(SS + "sampler")
    solvers = solver.values if solver else (config.scheduled_sampling.sampler,)
    forwards = (4 if "rk4" in solvers else 1) * (2 if largest("guidance_scale") != 1 else 1)
    # Half of K on average, and one forward more where ReflexFlow compares.
    rolled = largest("max_step_offset") / 2 * forwards + 1
    before, after = largest("prob_start"), largest("prob_end")
    samples, start = config.training.batch_size, largest("start_step")
    per_sample = start * (3 + before * rolled) + ramp * (3 + (before + after) / 2 * rolled)
    return samples * per_sample, int(start + ramp)


def _rolls(sweep: SweepConfig, config: RunConfig) -> bool:
    exposure = sweep.space.get("exposure")
    methods = exposure.values if exposure else (config.exposure,)
    return "scheduled_sampling" in methods
