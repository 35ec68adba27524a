"""A checkpoint through a network that torch's fully_shard really has spread over two ranks."""

from __future__ import annotations

import pytest
import torch

from raysched.evaluation.model_source import load_model
from raysched.models.weights import weights_sha256
from raysched.training.checkpoint import checkpoint_folders, load_checkpoint
from tests.training.ranks import answers, start_ranks
from tests.training.runs import run_loop, small_config

ROUND_TRIP = """
import dataclasses, json, sys, types
from pathlib import Path
import torch
from torch.distributed.fsdp import fully_shard
from raysched.models.ema import EMA
from raysched.models.sharding import local
from raysched.models.weights import weights_sha256
from raysched.training.keeper import Keeper
from raysched.training.setup import build_run
from raysched.training.wrapping import is_sharded, whole_weights
from tests.training.runs import small_config

plain = build_run(small_config())
network = plain.policy
mesh = torch.distributed.init_device_mesh("cpu", (2,))
fully_shard(network, mesh=mesh)
ema = EMA(network, 100.0)
# The average of this rank's rows only.
ema._parameters = {name: local(tensor) for name, tensor in ema._parameters.items()}
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
run = dataclasses.replace(
    plain,
    network=network,
    policy=network,
    ema=ema,
    optimizer=types.SimpleNamespace(optimizer=optimizer),
)
assert is_sharded(run)
keeper = Keeper(run, Path(sys.argv[1]))
read = keeper.restore()
run.step += 1
keeper.save({"metrics": {}})
keeper.on_disk()
# Rank 1's part is on the disk before rank 0 has put the whole together.
torch.distributed.barrier()
print(json.dumps({"read": read.step, "sha256": weights_sha256(whole_weights(run))}))
"""


@pytest.mark.slow
def test_two_ranks_take_their_rows_of_a_checkpoint_and_write_the_same_one(tmp_path):
    run_loop(small_config(training__budget__steps=6), tmp_path)
    before = load_checkpoint(checkpoint_folders(tmp_path)[-1])
    first, second = answers(start_ranks(ROUND_TRIP, [str(tmp_path)], 2))
    assert first == second
    assert first["read"] == 6
    assert first["sha256"] == weights_sha256(before.tensors["model"])
    folder = checkpoint_folders(tmp_path)[-1]
    assert folder.name == "step-00000007"
    sizes = [p.stat().st_size for p in sorted(folder.glob("optimizer-*-of-00002.safetensors"))]
    assert len(sizes) == 2
    assert max(sizes) < 1.3 * min(sizes)
    after = load_checkpoint(folder)
    for group, tensors in before.tensors.items():
        assert after.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(after.tensors[group][name], tensor), f"{group}: {name}"
    assert weights_sha256(load_model(folder, "online").network.state_dict()) == first["sha256"]
