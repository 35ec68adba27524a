"""Safetensors files, written without copies and read without surprises.

The writer hashes what it hands to the system, so that a checksum also covers what the disk makes
of it. Writing and hashing leave Python's lock to others: a training thread goes on meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from raysched.errors import StorageError
from raysched.models.pickles import refuse_pickle

if TYPE_CHECKING:
    from typing_extensions import Buffer

# The format's names, https://github.com/huggingface/safetensors (format section).
DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BLOCK = 1 << 20


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors to a safetensors file and make it durable.

    Args:
        path: the file; an unfinished one stays behind if the disk is full.
        tensors: on the CPU.

    Returns:
        SHA-256 of the file's bytes, in hexadecimal.

    Raises:
        OSError: with the system's own errno.
    """
    # Wide types first: every tensor begins at a multiple of its own width.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    digest = hashlib.sha256()
    blocks: list[Buffer] = [_header(tensors, names), *(_bytes(tensors[name]) for name in names)]
    with path.open("wb") as stream:
        for block in blocks:
            stream.write(block)
            digest.update(block)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        PickleError: it is a pickle, whatever its name.
        StorageError: the file is missing, cut short or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    refuse_pickle(path)
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: can't read the weights: {error}") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _header(tensors: Mapping[str, Tensor], names: list[str]) -> bytes:
    entries, end = {}, 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> Buffer:
    # numpy has no bfloat16: hand out the bytes themselves.
    flat = tensor.detach().contiguous().reshape(-1)
    return cast("Buffer", flat.view(torch.uint8).numpy())
