"""Host to device without waiting: plans are made on the host, and used by kernels queued later.

A copy from ordinary memory makes the host wait for the device; one from pinned memory is queued
like a kernel, and its memory is not reused before it has passed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(
    tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor on a device, cast on the side that it comes from.

    Args:
        tensor: any shape.
        device: where it is wanted.
        dtype: that it is wanted in; None keeps its own.
    """
    if dtype is not None:
        tensor = tensor.to(dtype)
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
