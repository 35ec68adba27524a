import hashlib
import json
import subprocess
import sys

import pytest
import torch

from raysched.errors import StorageError
from raysched.models.weights import load_weights, save_weights, weights_sha256

STATE = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.tensor(7, dtype=torch.int64),
    "c": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
}


def test_the_fingerprint_is_sha256_over_sorted_name_dtype_shape_and_bytes():
    digest = hashlib.sha256()
    for name, dtype, shape, raw in (
        ("a", "int64", [], (7).to_bytes(8, "little")),
        ("b", "float32", [2, 3], STATE["b"].numpy().tobytes()),
        ("c", "bfloat16", [2], bytes.fromhex("c03f00c0")),
    ):
        digest.update(json.dumps([name, dtype, shape]).encode() + raw)
    assert weights_sha256(STATE) == digest.hexdigest()


def test_order_layout_and_gradients_do_not_matter():
    shuffled = {name: STATE[name] for name in ("c", "b", "a")}
    shuffled["b"] = STATE["b"].t().contiguous().t().requires_grad_()
    assert weights_sha256(shuffled) == weights_sha256(STATE)


@pytest.mark.parametrize(
    "changed",
    [
        {"b": STATE["b"] + 1e-6},
        {"b": STATE["b"].reshape(3, 2)},
        {"b": STATE["b"].to(torch.float64)},
        {"b": STATE["b"].view(torch.int32)},
        {"d": STATE["b"]},
    ],
)
def test_a_name_a_dtype_a_shape_and_a_bit_matter(changed):
    assert weights_sha256({**STATE, **changed}) != weights_sha256(STATE)


def test_another_process_finds_the_same_fingerprint(tmp_path):
    save_weights(tmp_path / "w.safetensors", STATE)
    program = (
        "import sys; from pathlib import Path;"
        "from raysched.models.weights import load_weights, weights_sha256;"
        "print(weights_sha256(load_weights(Path(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "w.safetensors")],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == weights_sha256(STATE)


def test_weights_survive_a_file(tmp_path):
    save_weights(tmp_path / "w.safetensors", STATE)
    loaded = load_weights(tmp_path / "w.safetensors")
    assert loaded.keys() == STATE.keys()
    assert all(torch.equal(loaded[name], STATE[name]) for name in STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_tensors_that_share_memory_can_be_saved(tmp_path):
    base = torch.arange(4.0)
    save_weights(tmp_path / "w.safetensors", {"x": base, "y": base, "z": base[1:]})
    assert torch.equal(load_weights(tmp_path / "w.safetensors")["z"], base[1:])


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_file_cut_short_is_a_message_that_names_it(tmp_path, kept):
    path = tmp_path / "w.safetensors"
    save_weights(path, STATE)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(StorageError, match=r"w\.safetensors: can't read"):
        load_weights(path)


def test_a_missing_file_and_a_missing_folder_are_messages(tmp_path):
    with pytest.raises(StorageError, match="can't read"):
        load_weights(tmp_path / "none.safetensors")
    with pytest.raises(StorageError, match="can't write"):
        save_weights(tmp_path / "no" / "folder.safetensors", STATE)
