"""Which of the states that a rollout passes through are trained on beside the last.

A state is named by its sample and by how many steps of the rollout lie behind it, 1 to k - 1; the
last one, after k steps, is x_hat_t itself and is always trained on.

Legend: B samples, E states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raysched.config.run import ScheduledSamplingConfig
from raysched.diffusion.curriculum import RolloutPlan
from raysched.diffusion.schedules import NoiseSchedule


@dataclass(frozen=True)
class PassedStates:
    """States on the way, ordered by sample, then along the way; on the host.

    Attributes:
        samples: (E,) int64, rows of the plan.
        steps: (E,) int64, steps behind each state.
        u: (E,) float64, where on the path it is.
    """

    samples: Tensor
    steps: Tensor
    u: Tensor

    def __len__(self) -> int:
        """E."""
        return len(self.samples)


def spaced_steps(num_steps: Tensor, reuse: Literal["last", "all"] | int) -> tuple[Tensor, Tensor]:
    """At most `reuse` evenly spaced states of each rollout, without its last one.

    Args:
        num_steps: (B,) int64, k.
        reuse: last, all, or the most states per rollout, the last one included.

    Returns:
        (E,) rows and (E,) steps behind the states, 1 to k - 1.
    """
    if reuse == "last":
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    kept = num_steps if reuse == "all" else num_steps.clamp_max(reuse)
    most = int(kept.max()) if kept.numel() else 0
    place = torch.arange(1, max(most, 1))
    # round(k m / n), halves upwards: distinct, since n <= k, and k itself for m = n.
    n = kept.clamp_min(1)[:, None]
    steps = (2 * num_steps[:, None] * place + n) // (2 * n)
    rows, columns = torch.nonzero(place < n, as_tuple=True)
    return rows, steps[rows, columns]


def passed_states(
    plan: RolloutPlan, schedule: NoiseSchedule, config: ScheduledSamplingConfig
) -> PassedStates:
    """The states that `reuse` asks for, within the window that targets have.

    Args:
        plan: the rollouts.
        schedule: the noise schedule.
        config: its `reuse`, `t_min` and `t_max` decide.
    """
    samples, steps = spaced_steps(plan.num_steps, config.reuse)
    u = plan.nodes_u[samples, steps]
    t = schedule.path_time(u)
    inside = (t >= config.t_min) & (t <= config.t_max)
    return PassedStates(samples[inside], steps[inside], u[inside])
