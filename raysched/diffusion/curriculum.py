"""Which samples are rolled out, from where, and in how many steps.

A plan is drawn from (seed, step, global sample index) alone, by streams that nothing else uses,
so that it is the same on every rank and that probability 0 changes no other draw. Windows on the
path time t say which samples may be targets and how noisy a source may be; curricula say how the
chance p of a rollout and the largest offset K grow with the optimizer step.

Legend: B samples, K the largest offset, N the rollout grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raysched.config.run import RunConfig, ScheduledSamplingConfig
from raysched.diffusion.randomness import uniforms
from raysched.diffusion.schedules import NoiseSchedule


@dataclass(frozen=True)
class RolloutPlan:
    """The rollouts of one batch; float64 and int64 on the CPU.

    Attributes:
        target_u: (B,), uniform coordinate that a sample is trained at.
        source_u: (B,), where its rollout starts; the target itself if num_steps is 0.
        target_t: (B,), path time of the target (shifted on a flow path).
        source_t: (B,), path time of the source.
        num_steps: (B,) int64, k after clamping; 0 is teacher forcing.
        nodes_u: (B, max k + 1), the coordinates visited, from source to target, then padded
            with the target.
        num_clamped: samples whose drawn k did not fit on the path.
    """

    target_u: Tensor
    source_u: Tensor
    target_t: Tensor
    source_t: Tensor
    num_steps: Tensor
    nodes_u: Tensor
    num_clamped: int

    @property
    def rolled(self) -> Tensor:
        """(B,) bool: the samples with k > 0."""
        return self.num_steps > 0

    @property
    def num_rolled(self) -> int:
        """R, the number of samples with k > 0."""
        return int(self.rolled.sum())

    def select(self, rows: Tensor) -> RolloutPlan:
        """The plan of some of the samples; `num_clamped` stays that of the whole batch."""
        k = self.num_steps[rows]
        width = int(k.max()) + 1 if k.numel() else 1
        return replace(
            self,
            target_u=self.target_u[rows],
            source_u=self.source_u[rows],
            target_t=self.target_t[rows],
            source_t=self.source_t[rows],
            num_steps=k,
            nodes_u=self.nodes_u[rows, :width],
        )


def probability_at(step: int, config: ScheduledSamplingConfig) -> float:
    """Chance of a rollout at an optimizer step: constant, or a linear or cosine ramp."""
    if config.ramp_steps == 0:
        return config.probability
    done = _ramp(step, config.start_step, config.ramp_steps, config.ramp_shape)
    return config.prob_start + (config.prob_end - config.prob_start) * done


def max_offset_at(step: int, config: ScheduledSamplingConfig) -> int:
    """K at an optimizer step: constant, or rounded along its ramp, halves upwards; 0 is off."""
    if config.max_step_offset == 0 or config.offset_ramp_steps == 0:
        return config.max_step_offset
    done = _ramp(step, config.start_step, config.offset_ramp_steps, config.ramp_shape)
    span = config.max_step_offset - config.offset_start
    return math.floor(config.offset_start + span * done + 0.5)


def _ramp(step: int, start: int, length: int, shape: str) -> float:
    """Share of a ramp that lies behind a step, 0 to 1."""
    done = min(max((step - start) / length, 0.0), 1.0)
    return 0.5 * (1 - math.cos(math.pi * done)) if shape == "cosine" else done


def draw_offsets(strategy: str, v: Tensor, max_step_offset: int) -> Tensor:
    """Offsets from uniforms, by inversion.

    Args:
        strategy: uniform U{0..K}, biased_early round(v²K) or biased_late round((1 - v²)K).
        v: (B,) uniforms in (0, 1).
        max_step_offset: K.

    Returns:
        (B,) int64 in 0..K.
    """
    if strategy == "uniform":
        return torch.floor(v * (max_step_offset + 1)).long().clamp_max(max_step_offset)
    share = v**2 if strategy == "biased_early" else 1 - v**2
    return torch.floor(share * max_step_offset + 0.5).long()


def stratified_uniforms(keys: Tensor, shift: float) -> Tensor:
    """One point in each of m equal cells of (0, 1), the same place in every cell, dealt by rank.

    Systematic sampling (Madow and Madow 1944): each point is uniform if the keys' order and the
    shift are random, but together they hit every interval of length P floor(m P) or ceil(m P)
    times.

    Args:
        keys: (m,), whose order decides who gets which cell.
        shift: the place within the cells, in (0, 1).
    """
    ranks = torch.argsort(torch.argsort(keys, stable=True), stable=True)
    return (ranks.double() + shift) / max(len(keys), 1)


def plan_from_steps(
    schedule: NoiseSchedule,
    target_u: Tensor,
    num_steps: Tensor,
    grid: int,
    source_u_max: float = 1.0,
) -> RolloutPlan:
    """The plan of given offsets, clamped to the path.

    Args:
        schedule: the noise schedule.
        target_u: (B,).
        num_steps: (B,) int64 offsets in steps of the grid.
        grid: N.
        source_u_max: the noisiest source allowed.
    """
    target_u = target_u.double()
    k = schedule.clamp_steps(target_u, num_steps, grid, source_u_max)
    walked = torch.arange(int(k.max()) + 1 if k.numel() else 1)
    remaining = (k[:, None] - walked[None, :]).clamp_min(0)
    nodes = schedule.nodes(target_u[:, None], remaining, grid)
    return _plan(schedule, target_u, nodes, k, int((k < num_steps).sum()))


def draw_step(config: RunConfig, schedule: NoiseSchedule, step: int) -> RolloutPlan:
    """The plan of the global batch of an optimizer step, times included: what training draws."""
    seed, size = config.seed, config.training.batch_size
    indices = torch.arange(step * size, (step + 1) * size)
    target_u = schedule.training_u(uniforms(seed, "time", step, indices)[:, 0])
    return draw_plan(config, schedule, target_u, seed, step, indices)


def draw_plan(
    config: RunConfig,
    schedule: NoiseSchedule,
    target_u: Tensor,
    seed: int,
    step: int,
    indices: Tensor,
) -> RolloutPlan:
    """Draw the rollouts of an optimizer step.

    Args:
        config: the run; the rollouts of its method decide.
        schedule: the noise schedule.
        target_u: (B,), the targets that were drawn for the batch.
        seed: the run's seed.
        step: optimizer step.
        indices: (B,) int64 global sample indices; with `stratified` those of the whole global
            batch, since the samples share a histogram then.
    """
    rollout = config.rollout
    probability, largest = probability_at(step, rollout), max_offset_at(step, rollout)
    grid = schedule.num_train_timesteps if rollout.grid is None else rollout.grid
    if largest == 0 or probability == 0:
        zero = torch.zeros(target_u.shape[0], dtype=torch.int64)
        return plan_from_steps(schedule, target_u, zero, schedule.num_train_timesteps)
    target_t = schedule.path_time(target_u)
    allowed = (target_t >= rollout.t_min) & (target_t <= rollout.t_max)
    source_u_max = schedule.uniform_coordinate(rollout.source_t_max)
    chosen, v = _draws(rollout.stratified, probability, allowed, seed, step, indices)
    if grid == "jump":
        r = uniforms(seed, "rollout_jump", step, indices)[:, 0]
        return _jump_plan(schedule, target_u.double(), chosen, r, source_u_max)
    k = draw_offsets(rollout.strategy, v, largest) * chosen
    return plan_from_steps(schedule, target_u, k, grid, source_u_max)


def _draws(
    stratified: bool, probability: float, allowed: Tensor, seed: int, step: int, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """Who is rolled out, (B,) bool, and the uniforms (B,) that their offsets come from."""
    if not stratified:
        chosen = uniforms(seed, "rollout_bernoulli", step, indices)[:, 0] < probability
        return chosen & allowed, uniforms(seed, "rollout_offset", step, indices)[:, 0]
    # One uniform decides both: below p it is stretched to the offset's. Only samples that may
    # be targets share the strata, so that windows do not spoil the histogram.
    keys = uniforms(seed, "rollout_strata", step, indices)[:, 0]
    shift = uniforms(seed, "rollout_shift", step, torch.zeros(1, dtype=torch.int64))
    w = torch.ones_like(keys)
    w[allowed] = stratified_uniforms(keys[allowed], float(shift))
    return allowed & (w < probability), (w / probability).clamp_max(1.0)


def _jump_plan(
    schedule: NoiseSchedule, target_u: Tensor, chosen: Tensor, r: Tensor, source_u_max: float
) -> RolloutPlan:
    """One step of random length from a source uniform in (u, source_u_max]."""
    if schedule.is_flow:
        source_u = target_u + (source_u_max - target_u).clamp_min(0.0) * r
        possible = source_u > target_u
    else:
        count = schedule.num_train_timesteps
        index = schedule.index(target_u)
        room = round(source_u_max * count) - 1 - index
        possible = room > 0
        source_u = (index + 2 + torch.floor(r * room).long()).double() / count
    k = (chosen & possible).long()
    source_u = torch.where(k > 0, source_u, target_u)
    nodes = torch.stack([source_u, target_u], dim=1)
    return _plan(schedule, target_u, nodes, k, int((chosen & ~possible).sum()))


def _plan(
    schedule: NoiseSchedule, target_u: Tensor, nodes: Tensor, k: Tensor, num_clamped: int
) -> RolloutPlan:
    return RolloutPlan(
        target_u=target_u,
        source_u=nodes[:, 0],
        target_t=schedule.path_time(target_u),
        source_t=schedule.path_time(nodes[:, 0]),
        num_steps=k,
        nodes_u=nodes,
        num_clamped=num_clamped,
    )
