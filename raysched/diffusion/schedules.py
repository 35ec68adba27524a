"""Noise schedules: x_t = alpha·x0 + sigma·eps along the uniform path coordinate u.

u in [0, 1], 0 = data. A DDPM schedule has training indices i = 0..T-1 at u = (i + 1)/T and is
clean at u = 0; u is snapped to its index. Flow matching has t = shift(u), alpha = 1 - t,
sigma = t and snaps nothing. Everything is float64 on the CPU: plans and solver tables are made
there once per optimizer step, and cast when they are finished.

Legend: B samples, T training timesteps, N steps of the rollout grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raysched.config.run import NoiseScheduleConfig, ScheduleKind

MODEL_TIME_SCALE = 1000.0
# Rounding that the largest offset on a path forgives.
CLAMP_TOLERANCE = 1e-6
_COSINE_OFFSET, _MAX_BETA = 0.008, 0.999


def _betas(config: NoiseScheduleConfig) -> Tensor:
    """Betas of a DDPM schedule, (T,) float64."""
    count = config.num_train_timesteps
    if config.kind == "linear":  # Ho et al. 2020, arXiv 2006.11239
        return torch.linspace(config.beta_start, config.beta_end, count, dtype=torch.float64)
    if config.kind == "scaled_linear":  # Rombach et al. 2022: linear in the square root
        ends = math.sqrt(config.beta_start), math.sqrt(config.beta_end)
        return torch.linspace(*ends, count, dtype=torch.float64) ** 2
    # Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 17
    edges = torch.arange(count + 1, dtype=torch.float64) / count
    bar = torch.cos((edges + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2) ** 2
    return (1 - bar[1:] / bar[:-1]).clamp_max(_MAX_BETA)


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha and sigma along u, training times and rollout grids.

    Attributes:
        kind: flow, linear, scaled_linear or cosine.
        num_train_timesteps: T.
        shift: the flow's time shift s.
        timestep_sampling: law of the training time.
        table: (2, T + 1) float64, alpha and sigma at u = i/T; empty for flow.
    """

    kind: ScheduleKind
    num_train_timesteps: int
    shift: float
    timestep_sampling: str
    table: Tensor

    @classmethod
    def from_config(cls, config: NoiseScheduleConfig) -> NoiseSchedule:
        """The schedule that a run's config describes."""
        table = torch.empty(2, 0, dtype=torch.float64)
        if config.kind != "flow":
            bar = torch.cumprod(1 - _betas(config), dim=0)
            bar = torch.cat([torch.ones(1, dtype=torch.float64), bar])
            table = torch.stack([bar.sqrt(), (1 - bar).sqrt()])
        return cls(
            kind=config.kind,
            num_train_timesteps=config.num_train_timesteps,
            shift=config.shift,
            timestep_sampling=config.timestep_sampling,
            table=table,
        )

    @property
    def is_flow(self) -> bool:
        """Whether the path is the linear one of flow matching."""
        return self.kind == "flow"

    def index(self, u: Tensor) -> Tensor:
        """Training index of u on a DDPM schedule, int64; -1 is the clean end."""
        return torch.round(u.double() * self.num_train_timesteps).long() - 1

    def path_time(self, u: Tensor) -> Tensor:
        """t: the shifted time of the flow, or u snapped to its index. Any shape, float64."""
        if self.is_flow:
            u = u.double()
            return self.shift * u / (1 + (self.shift - 1) * u)
        return (self.index(u) + 1).double() / self.num_train_timesteps

    def uniform_coordinate(self, t: float) -> float:
        """u of a path time: the inverse of the flow's shift, or the last index at or below t."""
        if self.is_flow:
            return t / (self.shift - (self.shift - 1) * t)
        count = self.num_train_timesteps
        return math.floor(t * count + CLAMP_TOLERANCE) / count

    def alpha_sigma(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at u, float64 and of u's shape; (1, 0) at u = 0."""
        if self.is_flow:
            t = self.path_time(u)
            return 1 - t, t
        position = self.index(u) + 1
        return self.table[0][position], self.table[1][position]

    def model_time(self, u: Tensor) -> Tensor:
        """What the network gets as `timestep`: the index, or 1000·t; float64 of u's shape."""
        if self.is_flow:
            return MODEL_TIME_SCALE * self.path_time(u)
        return self.index(u).double()

    def index_at_ratio(self, ratio: Tensor) -> Tensor:
        """Fractional DDPM index where sigma/alpha is `ratio`, linear in log(sigma/alpha)."""
        known = torch.log(self.table[1][1:] / self.table[0][1:])
        wanted = torch.log(ratio.double())
        right = torch.searchsorted(known, wanted.contiguous()).clamp(1, known.numel() - 1)
        left = right - 1
        weight = (wanted - known[left]) / (known[right] - known[left])
        return left.double() + weight.clamp(0.0, 1.0)

    def training_u(self, r: Tensor) -> Tensor:
        """Training times from uniforms, by inversion.

        Args:
            r: (B,) uniforms in (0, 1).

        Returns:
            (B,) u in (0, 1): uniform or logit-normal (Esser et al. 2024, arXiv 2403.03206);
            on a DDPM schedule, the u of one of the T indices.
        """
        r = r.double()
        if self.timestep_sampling == "logit_normal":
            r = torch.sigmoid(torch.special.ndtri(r))
        if self.is_flow:
            return r
        index = (r * self.num_train_timesteps).long().clamp_max(self.num_train_timesteps - 1)
        return (index + 1).double() / self.num_train_timesteps

    def clamp_steps(self, u: Tensor, k: Tensor, grid: int, u_max: float = 1.0) -> Tensor:
        """Offsets that stay on the path: the source must not lie beyond its noisy end.

        Args:
            u: (B,) targets.
            k: (B,) int64 offsets in steps of the grid.
            grid: N.
            u_max: the noisiest source allowed.

        Returns:
            (B,) int64; integer arithmetic where there are indices.
        """
        if self.is_flow:
            room = torch.floor((u_max - u.double()) * grid + CLAMP_TOLERANCE).long()
        else:
            last = round(u_max * self.num_train_timesteps) - 1
            room = (last - self.index(u)) * grid // self.num_train_timesteps
        return torch.minimum(k, room.clamp_min(0))

    def nodes(self, u: Tensor, steps: Tensor, grid: int) -> Tensor:
        """The coordinates `steps` grid steps above u: u + j/N, on a DDPM schedule rounded.

        Args:
            u: targets, broadcastable against `steps`.
            steps: int64 j >= 0; j = 0 gives the target itself, never snapped on a flow path.
            grid: N.

        Returns:
            float64, at most 1.
        """
        if self.is_flow:
            return (u.double() + steps.double() / grid).clamp_max(1.0)
        count = self.num_train_timesteps
        offset = (2 * steps * count + grid) // (2 * grid)  # round(j T / N), halves upwards
        return (self.index(u) + 1 + offset).clamp_max(count).double() / count
