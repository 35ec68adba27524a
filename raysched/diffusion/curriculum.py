"""Which samples are rolled out, from where, and in how many steps.

A plan is drawn from (seed, step, global sample index) alone, by streams that nothing else uses,
so that it is the same on every rank and that probability 0 changes no other draw.

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
    done = min(max((step - config.start_step) / config.ramp_steps, 0.0), 1.0)
    if config.ramp_shape == "cosine":
        done = 0.5 * (1 - math.cos(math.pi * done))
    return config.prob_start + (config.prob_end - config.prob_start) * done


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


def plan_from_steps(
    schedule: NoiseSchedule, target_u: Tensor, num_steps: Tensor, grid: int
) -> RolloutPlan:
    """The plan of given offsets, clamped to the path.

    Args:
        schedule: the noise schedule.
        target_u: (B,).
        num_steps: (B,) int64 offsets in steps of the grid.
        grid: N.
    """
    target_u = target_u.double()
    k = schedule.clamp_steps(target_u, num_steps, grid)
    walked = torch.arange(int(k.max()) + 1 if k.numel() else 1)
    remaining = (k[:, None] - walked[None, :]).clamp_min(0)
    nodes = schedule.nodes(target_u[:, None], remaining, grid)
    return _plan(schedule, target_u, nodes, k, int((k < num_steps).sum()))


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
        config: the run; its `exposure` and `scheduled_sampling` decide.
        schedule: the noise schedule.
        target_u: (B,), the targets that were drawn for the batch.
        seed: the run's seed.
        step: optimizer step.
        indices: (B,) int64 global sample indices.
    """
    rollout = config.scheduled_sampling
    probability = probability_at(step, rollout)
    grid = schedule.num_train_timesteps if rollout.grid is None else rollout.grid
    off = config.exposure == "none" or rollout.max_step_offset == 0 or probability == 0
    if off:
        zero = torch.zeros(target_u.shape[0], dtype=torch.int64)
        return plan_from_steps(schedule, target_u, zero, schedule.num_train_timesteps)
    chosen = uniforms(seed, "rollout_bernoulli", step, indices)[:, 0] < probability
    if grid == "jump":
        r = uniforms(seed, "rollout_jump", step, indices)[:, 0]
        return _jump_plan(schedule, target_u.double(), chosen, r)
    v = uniforms(seed, "rollout_offset", step, indices)[:, 0]
    k = draw_offsets(rollout.strategy, v, rollout.max_step_offset)
    return plan_from_steps(schedule, target_u, k * chosen, grid)


def _jump_plan(
    schedule: NoiseSchedule, target_u: Tensor, chosen: Tensor, r: Tensor
) -> RolloutPlan:
    """One step of random length from a source uniform in (u, 1]."""
    if schedule.is_flow:
        room = 1 - target_u
        source_u = target_u + room * r
        possible = source_u > target_u
    else:
        count = schedule.num_train_timesteps
        index = schedule.index(target_u)
        room = count - 1 - index
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
