"""Counter-based randomness: what is drawn depends on (seed, purpose, step, sample index) only.

Every sample has its own stream for every purpose and step, so that a resumed run, another number
of workers or another batch composition draws the same numbers, and so that a purpose that is not
used shifts no other. Streams are SplitMix64 sequences (Steele, Lea and Flood, 2014) whose start
is hashed from the four names; all samples of a batch are drawn at once.

Legend: B samples, D… sample dims.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalizer of SplitMix64: a bijection of the 64-bit integers without visible structure."""
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def _streams(seed: int, purpose: str, step: int, indices: Tensor) -> NDArray[np.uint64]:
    """Start of each sample's sequence, (B,)."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    key = np.uint64(int.from_bytes(digest[:8], "little"))
    samples = indices.detach().cpu().numpy().astype(np.int64).view(np.uint64)
    return _mix(_mix(samples * _GOLDEN + key) ^ key)


def _words(streams: NDArray[np.uint64], num: int) -> NDArray[np.uint64]:
    """The first `num` 64-bit words of each stream, (B, num)."""
    counters = np.arange(1, num + 1, dtype=np.uint64) * _GOLDEN
    return _mix(streams[:, None] + counters[None, :])


def _open_unit(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniform doubles strictly between 0 and 1: 52 bits, centred in their cells."""
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def uniforms(seed: int, purpose: str, step: int, indices: Tensor, num: int = 1) -> Tensor:
    """Independent uniforms in the open interval (0, 1).

    Args:
        seed: the run's seed.
        purpose: name of what is drawn; each name is a stream of its own.
        step: optimizer step (0 where there is none).
        indices: (B,) int64, global sample indices.
        num: draws per sample.

    Returns:
        (B, num) float64 on the CPU.
    """
    return torch.from_numpy(_open_unit(_words(_streams(seed, purpose, step, indices), num)))


def normals(
    seed: int,
    purpose: str,
    step: int,
    indices: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Independent standard normals by the Box-Muller transform, computed in float64.

    Torch's own CPU generator keeps 32 bits of a seed only, so one generator per sample would
    repeat whole samples after some ten thousand; these streams have 64 bits.

    Returns:
        (B, *shape) of `dtype` on the CPU.
    """
    count = math.prod(shape)
    pairs = (count + 1) // 2
    unit = _open_unit(_words(_streams(seed, purpose, step, indices), 2 * pairs))
    radius = np.sqrt(-2.0 * np.log(unit[:, :pairs]))
    angle = (2.0 * math.pi) * unit[:, pairs:]
    values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :count]
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).view(-1, *shape)


def generator(seed: int, purpose: str, step: int = 0, index: int = 0) -> torch.Generator:
    """A torch generator for draws that are made once (permutations, initial weights)."""
    word = _words(_streams(seed, purpose, step, torch.tensor([index])), 1)[0, 0]
    return torch.Generator().manual_seed(int(word) & 0x7FFFFFFFFFFFFFFF)
