"""Tensors of which every rank holds some rows: this rank's part, and the whole.

FSDP2 (torch's `fully_shard`) splits each parameter along its first dimension into as many chunks
as there are ranks; ranks at the end may get fewer rows, or none. Plain tensors pass unchanged, so
that callers need not ask which they have.

Legend: N rows of the whole tensor, n of them here, D… further dims.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's parameters are spread over the ranks."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local(tensor: Tensor) -> Tensor:
    """This rank's rows (n, D…), sharing memory with the tensor; all of a plain tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """Where this rank's rows begin in the whole tensor; N if it has none."""
    if not isinstance(tensor, DTensor):
        return 0
    mesh = tensor.device_mesh
    chunk = -(-tensor.shape[0] // mesh.size())
    first: int = min(mesh.get_local_rank() * chunk, tensor.shape[0])
    mine = min(chunk, tensor.shape[0] - first)
    assert local(tensor).shape[0] == mine, "not the row-wise chunks that fully_shard makes"
    return first


def rows_like(whole: Tensor, like: Tensor) -> Tensor:
    """The rows of a whole tensor (N, D…) that this rank holds of `like`, as a view."""
    first = first_row(like)
    return whole[first : first + local(like).shape[0]] if isinstance(like, DTensor) else whole


def spread_like(rows: Tensor, like: Tensor) -> Tensor:
    """This rank's rows (n, D…) as part of a tensor that is laid out as `like` is."""
    if not isinstance(like, DTensor):
        return rows
    return DTensor.from_local(
        rows.to(like.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def gathered(rows: Tensor, like: Tensor) -> Tensor:
    """The whole tensor (N, D…) from every rank's rows; all ranks must call it together."""
    spread = spread_like(rows, like)
    return spread.full_tensor() if isinstance(spread, DTensor) else spread


@torch.no_grad()
def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's `state_dict` of whole tensors; all ranks must call it together."""
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in module.state_dict().items()
    }
