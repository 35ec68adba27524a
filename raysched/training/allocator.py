"""The C library's allocator, set up for a process that trains on the CPU."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch

# From <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEEP_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks instead of handing them back to the kernel.

    Rollouts call the network with batches of many sizes; activations are then allocated and freed
    in changing sizes, and each hand-back costs page faults at the next call (7 % of a rollout
    step of the demo's model, benchmarks/RESULTS.md).

    Returns:
        Whether the C library took it; False where it is another one, which changes nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)
    return all(mallopt(setting, _KEEP_BYTES) == 1 for setting in settings)


def give_back_freed_memory() -> None:
    """Return what is free to the system and to the GPU's other users; after memory ran out."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
