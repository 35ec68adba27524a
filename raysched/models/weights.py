"""Weights on disk and their fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from raysched.errors import StorageError
from raysched.models.tensor_files import read_tensors


def weights_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """Fingerprint of weights: SHA-256 over (name, dtype, shape, bytes), sorted by name.

    Args:
        state_dict: the online weights, of the unwrapped network.

    Returns:
        64 hexadecimal digits, equal in every process that holds equal weights.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        header = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(json.dumps(header).encode())
        # numpy has no bfloat16: hash the bytes themselves.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_weights(path: Path, state_dict: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors; the file appears whole or not at all.

    Raises:
        StorageError: the folder can't be written.
    """
    from safetensors.torch import save

    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state_dict.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(save(tensors))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{path}: can't write the weights: {error}") from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        PickleError: it is a pickle, whatever its name.
        StorageError: the file is missing, cut short or not safetensors.
    """
    return read_tensors(path)
