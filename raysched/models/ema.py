"""Exponential moving average of a network's weights, by samples seen rather than by steps.

Half-life and warm-up as in EDM (Karras et al. 2022, arXiv 2206.00364, appendix F.2): counting in
samples keeps the average comparable between batch sizes and between budgets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from raysched.models.sharding import local

WARMUP_SHARE = 0.1
NUM_SAMPLES_KEY = "ema.num_samples"


class EMA:
    """The averaged weights, in fp32 whatever the precision of the model.

    Args:
        model: its present weights are the first average.
        half_life_samples: training samples after which a weight's share has halved.
    """

    def __init__(self, model: nn.Module, half_life_samples: float) -> None:
        self.half_life_samples = half_life_samples
        self.num_samples = 0
        self._parameters = {
            name: local(p.detach()).to(torch.float32, copy=True)
            for name, p in model.named_parameters()
        }
        self._buffers = {name: b.detach().clone() for name, b in model.named_buffers()}

    def decay(self, num_samples: int) -> float:
        """Share of the old average that survives an update by `num_samples` samples.

        The half-life is at most a tenth of the samples seen so far: without that, a short run's
        average would be mostly the random initial weights.
        """
        half_life = min(self.half_life_samples, WARMUP_SHARE * (self.num_samples + num_samples))
        return float(0.5 ** (num_samples / half_life))

    @torch.no_grad()
    def update(self, model: nn.Module, num_samples: int) -> None:
        """Move the average towards `model`, which has seen `num_samples` more samples."""
        if num_samples <= 0:
            return
        weight = 1.0 - self.decay(num_samples)
        averages, current = [], []
        for name, parameter in model.named_parameters():
            averages.append(self._parameters[name])
            current.append(local(parameter.detach()).to(torch.float32))
        torch._foreach_lerp_(averages, current, weight)
        for name, buffer in model.named_buffers():
            self._buffers[name].copy_(buffer)
        self.num_samples += num_samples

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights and the buffers, by the names of the model (not copied)."""
        return {**self._parameters, **self._buffers}

    def state_dict(self) -> dict[str, Tensor]:
        """All that `load_state_dict` needs, tensors only: `weights()` and the samples seen."""
        count = torch.tensor(self.num_samples, dtype=torch.int64)
        return {**self.weights(), NUM_SAMPLES_KEY: count}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state that `state_dict` returned.

        Raises:
            KeyError: a weight is missing, or there is one too many.
        """
        mine, theirs = self.state_dict().keys(), state.keys()
        if mine != theirs:
            raise KeyError(f"EMA weights differ: {sorted(mine ^ theirs)}")
        for name, tensor in self.weights().items():
            tensor.copy_(state[name])
        self.num_samples = int(state[NUM_SAMPLES_KEY])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averaged weights into `model`, in its own precision."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self._parameters[name])
        for name, buffer in model.named_buffers():
            buffer.copy_(self._buffers[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Let `model` have the averaged weights inside the `with`, and its own ones after it."""
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        own_buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(own[name])
                for name, buffer in model.named_buffers():
                    buffer.copy_(own_buffers[name])
