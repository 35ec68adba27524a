"""Forwards without gradient at the price of their arithmetic.

A small network spends a third of a forward in Python, module by module. Rollouts and evaluation
call one fixed forward thousands of times, so it is recorded once (torch.jit.trace) and replayed:
the same operators on the same parameters, bit for bit, without the calls between them. The
recording shares the network's weights; it follows every update. What it makes of times and
labels alone can be had for all forwards of a rollout at once (`flattening.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysched.models.flattening import FlatForward, flatten_recording
from raysched.models.networks import Denoiser

# A number of rows that no other dimension of a network is likely to have.
_RECORDED_ROWS = 13


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

    def __init__(self, flat: FlatForward) -> None:
        self._flat = flat

    def __call__(
        self,
        *,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        given: Sequence[Tensor] = (),
    ) -> Tensor:
        """Predict without gradient; (n, C, H, W), (n,), (n,) -> (n, C, H, W).

        `given` are rows of what `prepare` made of the same times and labels.
        """
        arguments = (sample, timestep, class_labels, *self._flat.parameters, *given)
        run = self._flat.body if given and self._flat.body is not None else self._flat.whole
        # The optimizing executor would specialise on shapes, which change from call to call.
        with torch.no_grad(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return run(*arguments)

    def prepare(
        self, shape: Sequence[int], timestep: Tensor, class_labels: Tensor
    ) -> tuple[Tensor, ...]:
        """What the network makes of times and labels alone, for many forwards at once.

        Args:
            shape: (C, H, W) of a sample.
            timestep: (W,).
            class_labels: (W,).

        Returns:
            Tensors of W rows each, `given` to the forwards; none if the network has no such part.
        """
        if self._flat.head is None or not len(timestep):
            return ()
        anything = timestep.new_zeros(1).expand(len(timestep), *shape)
        with torch.no_grad(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return self._flat.head(anything, timestep, class_labels, *self._flat.parameters)


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
                _Positional(network), _inputs(_RECORDED_ROWS, shape), check_trace=False
            )
            traced = TracedForward(flatten_recording(recording, _RECORDED_ROWS))
            same = _replays(traced, network, shape)
    except (RuntimeError, AttributeError):
        # torch.jit's way of saying that the recording does not fit another batch size, or that
        # this version of torch has none of the graph passes.
        return None
    finally:
        network.train(training)
    return traced if same else None


def _replays(traced: TracedForward, network: Denoiser, shape: tuple[int, int, int]) -> bool:
    """Whether the replay, whole and in two parts, gives the network's own bits."""
    sample, timestep, labels = _inputs(5, shape)
    expected = network(sample=sample, timestep=timestep, class_labels=labels)
    given = traced.prepare(shape, timestep, labels)
    whole, in_parts = (
        traced(sample=sample, timestep=timestep, class_labels=labels, given=known)
        for known in ((), given)
    )
    return torch.equal(whole, expected) and torch.equal(in_parts, expected)


def _inputs(count: int, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    sample = torch.randn(count, *shape, generator=generator)
    timestep = 1000 * torch.rand(count, generator=generator)
    return sample, timestep, torch.zeros(count, dtype=torch.int64)
