"""Generating images: fixed noise, fixed labels, a fixed number of network evaluations.

`nfe` counts network evaluations per sample: guidance counts two, a step of rk4 four, its last one
(to sigma = 0, Euler's) one.
Sampling walks u_j = j/N from 1 (noise) down to 0 (data).

Legend: n samples, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from raysched.config.run import PredictionType, SolverName
from raysched.diffusion.compute import ComputeMeter
from raysched.diffusion.randomness import normals
from raysched.diffusion.rollout import LaneNetwork, integrate
from raysched.diffusion.schedules import NoiseSchedule

RK4_STAGES = 4


def num_steps(nfe: int, solver: SolverName, guidance_scale: float = 1.0) -> int:
    """Solver steps that so many network evaluations pay for, rounded down, at least one.

    Args:
        nfe: network evaluations per sample.
        solver: name of the solver.
        guidance_scale: 1 is off.

    Returns:
        Steps of the sampling grid; a budget below the price of one step still gives that step.
    """
    branches = _branches(guidance_scale)
    if solver == "rk4":
        return max(1, (nfe // branches - 1) // RK4_STAGES + 1)
    return max(1, nfe // branches)


def num_evaluations(steps: int, solver: SolverName, guidance_scale: float = 1.0) -> int:
    """Network evaluations per sample of so many solver steps; the inverse of `num_steps`."""
    per_branch = RK4_STAGES * (steps - 1) + 1 if solver == "rk4" else steps
    return _branches(guidance_scale) * per_branch


def price_notes(
    where: str, nfe: Sequence[int], solver: SolverName, guidance_scale: float = 1.0
) -> list[str]:
    """A sentence for every number of network evaluations that can't be spent exactly.

    Args:
        where: the setting that holds them.
        nfe: network evaluations per sample.
        solver, guidance_scale: see `num_steps`.
    """
    notes = []
    for count in nfe:
        steps = num_steps(count, solver, guidance_scale)
        price = num_evaluations(steps, solver, guidance_scale)
        if price != count:
            notes.append(
                f"{where}: {count} pays for {steps} step(s) of {solver}, which take {price} "
                "network evaluations."
            )
    return notes


def _branches(guidance_scale: float) -> int:
    return 1 if guidance_scale == 1.0 else 2


def evaluation_noise(seed: int, num: int, shape: tuple[int, ...], *, first: int = 0) -> Tensor:
    """The noise that all trials share; a sample's is the same whatever `num` and `first` are.

    Args:
        seed: `evaluation.seed`.
        num: samples.
        shape: (C, H, W).
        first: index of the first of them.

    Returns:
        (num, C, H, W) unit Gaussians, float32, on the CPU.
    """
    return normals(seed, "evaluation_noise", 0, torch.arange(first, first + num), shape)


def balanced_labels(num: int, num_classes: int) -> Tensor:
    """Class i mod num_classes for sample i: (num,) int64."""
    return torch.arange(num) % num_classes


def sampling_nodes(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Coordinates j/N from 1 down to 0, on a DDPM schedule those of the nearest indices.

    Args:
        schedule: the noise schedule; with T indices there are at most T steps.
        steps: N.

    Returns:
        (N + 1,) float64.
    """
    if not schedule.is_flow:
        steps = min(steps, schedule.num_train_timesteps)
    zero = torch.zeros((), dtype=torch.float64)
    return schedule.nodes(zero, torch.arange(steps, -1, -1), steps)


@contextmanager
def eval_mode(network: Callable[..., Tensor]) -> Iterator[None]:
    """Switch the modules of a network to eval mode, and back to what each of them was."""
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


def network_device(network: Callable[..., Tensor]) -> torch.device:
    """Where a network's weights are; the CPU for a plain function."""
    parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
    first = next(parameters, None)
    return torch.device("cpu") if first is None else first.device


@torch.no_grad()
def generate(
    network: Callable[..., Tensor],
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    *,
    labels: Tensor,
    noise: Tensor,
    nfe: int,
    solver: SolverName,
    batch_size: int,
    null_class: int,
    guidance_scale: float = 1.0,
    epsilon_scaling: float | None = None,
    meter: ComputeMeter | None = None,
) -> Tensor:
    """Samples from given noise by the probability-flow ODE (Song et al. 2021, arXiv 2011.13456).

    Args:
        network: called by keyword with `sample`, `timestep` and `class_labels`.
        schedule: the noise schedule that the network was trained on.
        prediction_type: what the network predicts.
        labels: (n,) int64 classes.
        noise: (n, C, H, W) unit Gaussians.
        nfe: network evaluations per sample; see `num_steps` for how it rounds.
        solver: name of the solver.
        batch_size: samples per network call (guidance: twice as many rows).
        null_class: the label that means none, for guidance.
        guidance_scale: classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598); 1: off.
        epsilon_scaling: divisor of the predicted noise (Ning et al. 2023, arXiv 2308.15321).
        meter: counts the sample-forwards as evaluation.

    Returns:
        (n, C, H, W) float32 in [-1, 1] on the CPU; NaN where the network diverged.
    """
    nodes = sampling_nodes(schedule, num_steps(nfe, solver, guidance_scale))
    device = network_device(network)
    batches, classes_of = (torch.split(x, batch_size) for x in (noise, labels))
    parts = []
    with eval_mode(network):
        for x, classes in zip(batches, classes_of, strict=True):
            call = _conditioned(network, classes.to(device), null_class, guidance_scale, meter)
            parts.append(
                integrate(
                    call,
                    x.to(device, torch.float32),
                    schedule,
                    nodes,
                    solver=solver,
                    prediction_type=prediction_type,
                    epsilon_scaling=epsilon_scaling,
                ).x_hat.cpu()
            )
    samples = torch.cat(parts).float()
    # Clamping alone would turn an overflow into a plain white pixel.
    return torch.where(samples.isfinite(), samples.clamp(-1.0, 1.0), torch.nan)


def _conditioned(
    network: Callable[..., Tensor],
    labels: Tensor,
    null_class: int,
    guidance_scale: float,
    meter: ComputeMeter | None,
) -> LaneNetwork:
    """The network with labels and guidance built in, as the solvers call it."""

    def call(*, sample: Tensor, timestep: Tensor, lanes: Tensor) -> Tensor:
        classes = labels[lanes]
        if guidance_scale != 1.0:
            sample, timestep = torch.cat([sample, sample]), torch.cat([timestep, timestep])
            classes = torch.cat([classes, torch.full_like(classes, null_class)])
        if meter is not None:
            meter.forward("evaluation", len(sample))
        output = network(sample=sample, timestep=timestep, class_labels=classes)
        if guidance_scale == 1.0:
            return output
        conditional, unconditional = output.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return call
