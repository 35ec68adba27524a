"""Packing chains of network forwards into as few calls as possible.

A rollout of n forwards is a chain: its forwards must run one after another, but different chains
are independent. With at most `capacity` rows in a call no schedule needs fewer than
max(longest chain, ceil(all forwards/capacity)) calls, and McNaughton's wrap-around rule (1959)
reaches that bound: chains are laid end to end over slots as long as the number of calls; a chain
that overflows its slot begins in the next one, where it is earlier in time. All calls have the
same number of rows, give or take one, which is also what compiled networks like. Only cumulative
sums and one sort are needed, no loop over chains.

Legend: L chains, W forwards in all, M calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Forwards in the order in which they run, call after call.

    Attributes:
        chain: (W,) int64, whose forward it is.
        position: (W,) int64, the how-manieth forward of its chain.
        bounds: M + 1 offsets into the two: call c has the rows bounds[c]..bounds[c + 1].
    """

    chain: Tensor
    position: Tensor
    bounds: tuple[int, ...]

    @property
    def num_calls(self) -> int:
        """M."""
        return len(self.bounds) - 1


def calls_needed(lengths: Tensor, capacity: int) -> int:
    """The least number of calls: the longest chain, or all forwards over the capacity."""
    longest = int(lengths.max()) if lengths.numel() else 0
    return max(longest, -(-int(lengths.sum()) // capacity))


def pack_chains(lengths: Tensor, capacity: int, least_calls: int = 0) -> Packing:
    """Pack chains into the least number of calls.

    Args:
        lengths: (L,) int64 on the CPU, forwards per chain, 0 allowed.
        capacity: most rows in a call, at least 1.
        least_calls: spread the forwards over so many calls if fewer would do; calls are empty
            where there are fewer forwards than that.
    """
    # With numpy: a dozen operations on small arrays cost half of what torch takes.
    length = lengths.numpy()
    total = int(length.sum())
    num_calls = max(calls_needed(lengths, capacity), least_calls)
    if total == 0:
        empty = torch.empty(0, dtype=torch.int64)
        return Packing(empty, empty, (0,) * (num_calls + 1))
    chain = np.repeat(np.arange(len(length)), length)
    begin = np.cumsum(length) - length
    # Of each chain: the slot that it begins in, and how much of it is left for the next one.
    first_slot = begin // num_calls
    wrapped = np.maximum(begin + length - (first_slot + 1) * num_calls, 0)
    place = np.arange(total)
    slot, call = np.divmod(place, num_calls)
    in_first = slot == first_slot[chain]
    position = place - np.where(
        in_first, (begin - wrapped)[chain], (begin + length - wrapped)[chain]
    )
    order = np.argsort(call * (slot[-1] + 1) + slot)
    sizes = np.bincount(call, minlength=num_calls)
    bounds = (0, *np.cumsum(sizes).tolist())
    return Packing(torch.from_numpy(chain[order]), torch.from_numpy(position[order]), bounds)
