"""Rules between the settings of a rollout."""

from __future__ import annotations

import math

from raysched.config.rules import SS, Rule, rollouts_off, while_on
from raysched.config.run import RunConfig

# `NoiseSchedule.clamp_steps` forgives rounding by as much.
_TOLERANCE = 1e-6


def _window(c: RunConfig) -> str | None:
    s, noise = c.scheduled_sampling, c.noise_schedule
    text = f"leaves no target between t_min ({s.t_min:g}) and t_max ({s.t_max:g})"
    if noise.kind == "flow":
        return None if s.t_min < s.t_max else f"{text}; t_min must be < t_max"
    count = noise.num_train_timesteps
    first = max(math.ceil(s.t_min * count), 1)
    if first / count <= s.t_max:
        return None
    return f"{text}: no index i of {count} has (i + 1)/{count} there"


def _path_coordinate(c: RunConfig, t: float) -> float:
    """u of a path time t: the inverse of the flow's shift."""
    shift = c.noise_schedule.shift if c.noise_schedule.kind == "flow" else 1.0
    return t / (shift - (shift - 1) * t)


def _source(c: RunConfig) -> str | None:
    s, count = c.scheduled_sampling, c.noise_schedule.num_train_timesteps
    if _window(c):
        return None
    low, high = _path_coordinate(c, s.t_min), _path_coordinate(c, s.source_t_max)
    step = 0.0 if s.grid == "jump" else 1 / (s.grid or count)
    if c.noise_schedule.kind != "flow":
        low = max(math.ceil(s.t_min * count), 1) / count
        high, step = math.floor(high * count + _TOLERANCE) / count, max(step, 1 / count)
    # A flow's targets are continuous: exactly one step of room is room for no target.
    least = step + _TOLERANCE if c.noise_schedule.kind == "flow" and step else step - _TOLERANCE
    if high > low and high - low >= least:
        return None
    return (
        f"leaves no room for a rollout step above t_min ({s.t_min:g}), got {s.source_t_max:g}, "
        "so no sample can be a target"
    )


def _ancestral_sampler(c: RunConfig) -> str | None:
    s = c.scheduled_sampling
    if not s.ancestral or s.sampler == "euler":
        return None
    return f"must be false unless sampler is euler, got true with sampler {s.sampler}"


def _ancestral_target(c: RunConfig) -> str | None:
    s = c.scheduled_sampling
    if not s.ancestral or s.target != "original":
        return None
    return (
        "must be anchored or posterior_mean with ancestral, got original: fresh noise has left "
        "the noise behind that the original target speaks of"
    )


def _jump_policy(c: RunConfig) -> str | None:
    s = c.scheduled_sampling
    if not (s.jump_gradient and s.grid == "jump") or s.policy == "online":
        return None
    return "must be online with jump_gradient, got ema: the average gets no gradient"


def _guided_classes(c: RunConfig) -> str | None:
    if c.scheduled_sampling.guidance_scale == 1 or c.model.class_conditional:
        return None
    return (
        "must be 1 with model.class_conditional false, "
        f"got {c.scheduled_sampling.guidance_scale:g}: there is no label to be guided by"
    )


ROLLOUT_ERRORS: tuple[Rule, ...] = (
    Rule(
        SS + "t_max",
        (SS + "t_min", "noise_schedule.kind", "noise_schedule.num_train_timesteps"),
        _window,
        (SS + "t_min", SS + "t_max"),
    ),
    Rule(
        SS + "source_t_max",
        (SS + "t_min", SS + "grid", "noise_schedule.kind", "noise_schedule.shift"),
        _source,
        (SS + "t_min", SS + "source_t_max", SS + "grid"),
    ),
    Rule(SS + "ancestral", (SS + "sampler",), _ancestral_sampler),
    Rule(SS + "target", (SS + "ancestral",), _ancestral_target),
    Rule(SS + "policy", (SS + "jump_gradient", SS + "grid"), _jump_policy),
    Rule(SS + "guidance_scale", ("model.class_conditional",), _guided_classes),
)


def _clamped(c: RunConfig) -> str | None:
    offset, grid = c.scheduled_sampling.max_step_offset, c.scheduled_sampling.grid
    if not isinstance(grid, int) or offset <= grid:
        return None
    return f"is more than the whole path of {grid} steps (grid); longer rollouts are clamped"


def _falling(c: RunConfig) -> str | None:
    s = c.scheduled_sampling
    if not s.ramp_steps or s.prob_start <= s.prob_end:
        return None
    return f"is above prob_end ({s.prob_end:g}), so the chance falls along the ramp"


def _late(c: RunConfig) -> str | None:
    s, steps = c.scheduled_sampling, c.training.budget.steps
    if not s.ramp_steps or steps is None or s.start_step < steps:
        return None
    return f"is not before the budget's end ({steps} steps), so the ramp never begins"


def _null_class(c: RunConfig) -> str | None:
    if c.scheduled_sampling.guidance_scale == 1 or c.model.label_dropout > 0:
        return None
    return "needs a trained null class, but model.label_dropout is 0; guidance will be arbitrary"


def _falling_offset(c: RunConfig) -> str | None:
    s = c.scheduled_sampling
    if not s.offset_ramp_steps or s.offset_start <= s.max_step_offset:
        return None
    return f"is above max_step_offset ({s.max_step_offset}), so K falls along its ramp"


def _blind_windows(c: RunConfig) -> str | None:
    s = c.scheduled_sampling
    if rollouts_off(c) or s.t_max <= s.source_t_max:
        return None
    return (
        f"({s.t_max:g}) is above source_t_max ({s.source_t_max:g}); targets between them are "
        "teacher-forced"
    )


def _bucket(c: RunConfig) -> str | None:
    training, bucket = c.training, c.scheduled_sampling.bucket
    parts = max(c.scaling.num_workers, 1) * training.gradient_accumulation
    rows = -(-training.batch_size // parts)
    if rows % bucket == 0:
        return None
    return (
        f"pads calls to {-(-rows // bucket) * bucket} rows where micro-batches have {rows}, so "
        "that rollouts take more memory than steps; a divisor does not"
    )


ROLLOUT_CAUTIONS: tuple[Rule, ...] = (
    Rule(
        SS + "bucket",
        ("training.batch_size", "training.gradient_accumulation", "scaling.num_workers"),
        while_on(_bucket),
        (SS + "bucket",),
    ),
    Rule(SS + "max_step_offset", (SS + "grid",), while_on(_clamped)),
    Rule(SS + "prob_start", (SS + "prob_end",), while_on(_falling)),
    Rule(SS + "start_step", ("training.budget.steps",), while_on(_late), (SS + "start_step",)),
    Rule(SS + "guidance_scale", ("model.label_dropout",), while_on(_null_class)),
    Rule(SS + "offset_start", (SS + "max_step_offset",), while_on(_falling_offset)),
    Rule(SS + "t_max", (SS + "source_t_max",), _blind_windows, (SS + "t_max",)),
)
