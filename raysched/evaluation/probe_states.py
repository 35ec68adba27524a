"""Self-made states along the path: walks from pure noise, and rollouts from noised data.

Both are solved on common nodes, and what the network is asked at a node is the state there. So
one chain of K steps shows the rollouts of 1..K steps from its source, at no further cost; for
multistep solvers that state is the uncorrected predictor, as in training.

Legend: n samples, N grid steps, K longest rollout, C, H, W image dims.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raysched.config.run import PredictionType, SolverName
from raysched.diffusion.compute import ComputeMeter
from raysched.diffusion.parameterization import add_noise
from raysched.diffusion.rollout import integrate
from raysched.diffusion.schedules import NoiseSchedule
from raysched.errors import RunFailedError
from raysched.evaluation.sampling import RK4_STAGES, eval_mode, network_device


@dataclass(frozen=True, eq=False)
class Subject:
    """A network as the probe sees it.

    Args:
        network: called by keyword with `sample`, `timestep` and `class_labels`.
        schedule: the noise schedule that it was trained on.
        prediction_type: what it predicts.
        solver: that walks and rolls out.
        batch_size: most rows of a network call.
        meter: counts the forwards as evaluation.
    """

    network: Callable[..., Tensor]
    schedule: NoiseSchedule
    prediction_type: PredictionType
    solver: SolverName = "euler"
    batch_size: int = 200
    meter: ComputeMeter | None = None

    @torch.no_grad()
    def predict(self, x: Tensor, u: Tensor, labels: Tensor) -> Tensor:
        """(n, C, H, W) predictions at states of a common coordinate u, on the CPU."""
        device = network_device(self.network)
        time = self.schedule.model_time(u).float()
        parts = []
        with eval_mode(self.network):
            for rows, classes in _batches(x, labels, self.batch_size):
                if self.meter is not None:
                    self.meter.forward("evaluation", len(rows))
                out = self.network(
                    sample=rows.to(device),
                    timestep=time.expand(len(rows)).to(device),
                    class_labels=classes.to(device),
                )
                parts.append(out.float().cpu())
        return torch.cat(parts)

    def path(self, x: Tensor, nodes_u: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Solve the ODE along common nodes and keep what it passes.

        Args:
            x: (n, C, H, W) states at the first node.
            nodes_u: (N + 1,) descending coordinates.
            labels: (n,) int64 classes.

        Returns:
            States (N + 1, n, C, H, W) at all nodes, and predictions (N, n, C, H, W) at all but
            the last.

        Raises:
            RunFailedError: a state is not finite.
        """
        with eval_mode(self.network):
            parts = [
                self._path(rows, nodes_u, classes)
                for rows, classes in _batches(x, labels, self.batch_size)
            ]
        states, predictions = (torch.cat(found, dim=1) for found in zip(*parts, strict=True))
        if not bool(states.isfinite().all()):
            raise RunFailedError(
                "the network gives states that are not finite: its training diverged; probe an "
                "earlier checkpoint"
            )
        return states, predictions

    def _path(self, x: Tensor, nodes_u: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        device = network_device(self.network)
        classes = labels.to(device)
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def recorder(*, sample: Tensor, timestep: Tensor, lanes: Tensor) -> Tensor:
            if self.meter is not None:
                self.meter.forward("evaluation", len(sample))
            out = self.network(
                sample=sample, timestep=timestep, class_labels=classes[lanes.to(device)]
            )
            inputs.append(sample.cpu().clone())
            outputs.append(out.float().cpu())
            return out

        final = integrate(
            recorder,
            x.to(device),
            self.schedule,
            nodes_u,
            solver=self.solver,
            prediction_type=self.prediction_type,
        ).x_hat.cpu()
        # rk4 is at a node in every fourth of its forwards only.
        stride = RK4_STAGES if self.solver == "rk4" else 1
        return torch.stack([*inputs[::stride], final]), torch.stack(outputs[::stride])


def _batches(x: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(torch.split(x, size), torch.split(labels, size), strict=True))


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Rollouts of 1..K steps from noised data.

    Args:
        nodes_u: (N + 1,) the grid, descending from 1 to 0.
        x_hat: (target node, k) -> (n, C, H, W), the state that k steps led to.
        x_t: target node -> (n, C, H, W), the teacher-forced state there.
        x0: (n, C, H, W), the data.
    """

    nodes_u: Tensor
    x_hat: Mapping[tuple[int, int], Tensor]
    x_t: Mapping[int, Tensor]
    x0: Tensor


def forward_states(schedule: NoiseSchedule, u: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """x_t at a common coordinate u, (n, C, H, W)."""
    alpha, sigma = schedule.alpha_sigma(u.expand(len(x0)))
    return add_noise(x0, eps, alpha, sigma)


def roll_grid(
    subject: Subject,
    nodes_u: Tensor,
    x0: Tensor,
    eps: Tensor,
    labels: Tensor,
    *,
    max_offset: int,
    sources: list[int] | None = None,
) -> Rollouts:
    """Roll out from nodes of a grid, each time as far as K steps or the path's end.

    Args:
        subject: the network.
        nodes_u: (N + 1,) the grid, descending from 1 to 0.
        x0: (n, C, H, W) data.
        eps: (n, C, H, W) the noise that source and target share.
        labels: (n,) int64 classes.
        max_offset: K.
        sources: numbers of the nodes to start at; default: all but the last.
    """
    last = nodes_u.numel() - 1
    x_t = {node: forward_states(subject.schedule, nodes_u[node], x0, eps) for node in range(last)}
    x_t[last] = x0
    x_hat = {}
    for source in range(last) if sources is None else sources:
        end = min(source + max_offset, last)
        states, _ = subject.path(x_t[source], nodes_u[source : end + 1], labels)
        for k in range(1, end - source + 1):
            x_hat[source + k, k] = states[k]
    return Rollouts(nodes_u, x_hat, x_t, x0)
