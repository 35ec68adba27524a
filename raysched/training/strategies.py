"""How the ranks share a network: replicated (DDP through accelerate) or sharded (FSDP2).

Rollouts call the policy: under DDP the module inside the wrapper, so that no gradient is synced
and no buffer broadcast; under FSDP2 the sharded module itself, whose forwards gather the weights,
so that every rank must make as many of them. A compiled network is the same for both.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from raysched.config.run import RunConfig
from raysched.models.networks import Denoiser


def wants_shards(config: RunConfig) -> bool:
    """Whether this process is one of several that spread the weights among them."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and config.scaling.strategy == "fsdp"


def shard(network: Denoiser, device: torch.device, *, keep_whole: bool = True) -> None:
    """Spread the weights over all ranks, in place (FSDP2): block by block, the rest as one.

    Every rank has built the same weights and keeps its rows of them. The blocks gather their
    weights when they are called and let go of them afterwards.

    Args:
        network: its weights become each rank's rows.
        device: where it lives.
        keep_whole: what is in no block stays gathered until the next backward.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in _blocks(network.backbone):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=None if keep_whole else True)


def _blocks(backbone: nn.Module) -> list[nn.Module]:
    """The repeated parts of a UNet or a DiT."""
    blocks = [b for c in backbone.children() if isinstance(c, nn.ModuleList) for b in c]
    # A DiT asks its first block for the time embedding from outside, past the block's own gather.
    return blocks[1:] if hasattr(backbone, "transformer_blocks") else blocks


@contextlib.contextmanager
def gradient_sync(network: nn.Module, accelerator: Any, *, last: bool) -> Iterator[None]:
    """Sum the gradients over the ranks in the last micro-batch of a step only."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
        yield
    elif last:
        yield
    else:
        with accelerator.no_sync(network):
            yield


def check_wrapping(config: RunConfig, network: nn.Module, world_size: int) -> None:
    """Assert the wrapper that was asked for.

    accelerate falls back to one process in silence; training would go on without any sync.
    """
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    assert world_size == expected, f"accelerate sees {world_size} of {expected} processes"
    kind = type(network).__name__
    if wants_shards(config):
        assert isinstance(network, FSDPModule), f"fsdp was asked for, the network is a {kind}"
        assert all(isinstance(p, DTensor) for p in network.parameters()), "weights left whole"
    elif expected > 1:
        ddp = isinstance(network, DistributedDataParallel)
        assert ddp, f"{expected} ranks, but the network is a {kind}"
    else:
        assert not isinstance(network, DistributedDataParallel), "one rank, yet DDP"
