"""Forwards without gradient at the price of their arithmetic.

A small network spends a third of a forward in Python, module by module. Rollouts and evaluation
call one fixed forward thousands of times, so it is recorded once (torch.jit.trace) and replayed:
the same operators on the same parameters, bit for bit, without the calls between them. The
recording shares the network's weights; it follows every update.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from raysched.models.networks import Denoiser

Forward = Callable[..., Tensor]


class _Positional(nn.Module):
    """The network with the positional arguments that a recording takes."""

    def __init__(self, network: Denoiser) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Predict; (n, C, H, W), (n,), (n,) -> (n, C, H, W)."""
        out: Tensor = self.network(sample=sample, timestep=timestep, class_labels=class_labels)
        return out


class TracedForward:
    """A network's forward in eval mode, replayed; called by keyword like the network."""

    def __init__(self, recording: Forward) -> None:
        self._recording = recording

    def __call__(self, *, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Predict without gradient; (n, C, H, W), (n,), (n,) -> (n, C, H, W)."""
        # The optimizing executor would specialise on shapes, which change from call to call.
        with torch.no_grad(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return self._recording(sample, timestep, class_labels)


def trace_forward(network: Denoiser, shape: tuple[int, int, int]) -> TracedForward | None:
    """Record a network's forward; None where a replay would not be exactly the network.

    Args:
        network: on the CPU, in fp32; its training mode is as before afterwards.
        shape: (C, H, W) of a sample.

    Returns:
        The replay, checked bitwise against the network at another batch size. None on other
        devices and precisions, and for a network whose operators depend on the batch size.
    """
    weight = next(network.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    training = network.training
    network.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # The tracer warns of each shape that it takes for a constant; the check decides.
            warnings.simplefilter("ignore")
            recording = torch.jit.trace(  # type: ignore[no-untyped-call]
                _Positional(network), _inputs(2, shape), check_trace=False
            )
            traced = TracedForward(recording)
            sample, timestep, labels = _inputs(5, shape)
            arguments = {"sample": sample, "timestep": timestep, "class_labels": labels}
            same = torch.equal(traced(**arguments), network(**arguments))
    except RuntimeError:
        # torch.jit's way of saying that the recording does not fit another batch size.
        return None
    finally:
        network.train(training)
    return traced if same else None


def _inputs(count: int, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    sample = torch.randn(count, *shape, generator=generator)
    timestep = 1000 * torch.rand(count, generator=generator)
    return sample, timestep, torch.zeros(count, dtype=torch.int64)
