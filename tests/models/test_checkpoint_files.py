"""Tensor files, pickles under any name, and what a manifest promises."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raysched.errors import StorageError
from raysched.models.checkpoint_files import read_verified_group
from raysched.models.export import load_network
from raysched.models.pickles import PickleError, looks_pickled, refuse_pickled_folder
from raysched.models.tensor_files import DTYPES, read_tensors, sha256_of, write_tensors
from tests.models.manifests import write_manifest

TENSORS = {
    "matrix": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "count": torch.tensor(7),
    "half": torch.tensor([1.5, -2.0]).bfloat16(),
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.empty(0, 3),
}


def test_what_is_written_is_what_safetensors_itself_reads(tmp_path):
    path = tmp_path / "x.safetensors"
    digest = write_tensors(path, TENSORS)
    assert digest == sha256_of(path)
    for loaded in (load_file(path), read_tensors(path)):
        assert loaded.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_the_table_survives(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.ones(3, dtype=dtype)})
    assert load_file(path)["x"].dtype == dtype


def pickled(form: str) -> bytes:
    content = {"weight": torch.ones(2)}
    buffer = io.BytesIO()
    if form == "plain":
        pickle.dump({"weight": 1}, buffer)
    else:
        torch.save(content, buffer, _use_new_zipfile_serialization=form == "zip")
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_a_pickle_is_refused_whatever_its_name(tmp_path, form):
    for name in ("model.safetensors", "model.pt"):
        path = tmp_path / name
        path.write_bytes(pickled(form))
        with pytest.raises(PickleError, match="refused: this is a pickle"):
            read_tensors(path)


def test_a_pickles_code_never_runs(tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it-ran",))

    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(PickleError):
        read_tensors(path)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("length", range(640 - 16, 640 + 24, 8))
def test_safetensors_are_not_taken_for_pickles(tmp_path, length):
    """A header of 640 to 1400 bytes begins with the bytes of a pickle's protocol."""
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"n" * (length - 60): torch.ones(2)})
    assert not looks_pickled(path)


def test_a_folder_of_pickles_is_refused_and_one_with_safetensors_is_not(tmp_path):
    (tmp_path / "model.bin").write_bytes(pickled("zip"))
    with pytest.raises(PickleError, match=r"model\.bin"):
        refuse_pickled_folder(tmp_path)
    write_tensors(tmp_path / "model.safetensors", TENSORS)
    refuse_pickled_folder(tmp_path)


def test_a_pipeline_with_pickled_weights_is_refused(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickled("zip"))
    index = {"unet": ["diffusers", "UNet2DModel"], "class_names": [], "class_conditional": True}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(PickleError, match="diffusion_pytorch_model"):
        load_network(tmp_path)


def test_a_group_is_read_only_if_its_checksum_fits(tmp_path):
    for group in ("model", "ema"):
        write_tensors(tmp_path / f"{group}.safetensors", TENSORS)
    write_manifest(tmp_path)
    assert read_verified_group(tmp_path, "ema").keys() == TENSORS.keys()
    data = bytearray((tmp_path / "ema.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "ema.safetensors").write_bytes(bytes(data))
    read_verified_group(tmp_path, "model")
    with pytest.raises(StorageError, match=r"ema\.safetensors fails its checksum"):
        read_verified_group(tmp_path, "ema")
