"""DDP and FSDP2 on two and four gloo ranks train as one process does, rollouts on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raysched.errors import ConfigError
from raysched.training.setup import build_run
from raysched.training.train_step import train_step
from tests.training.runs import rollout_config

ROOT = Path(__file__).resolve().parents[2]
# The ranks are forks of one process that has imported everything.
SCRIPT = """
import json, os, socket
import torch
import torch.multiprocessing as mp
import diffusers.models.unets.unet_2d, diffusers.models.transformers.dit_transformer_2d
from raysched.training.setup import build_run
from raysched.training.train_step import train_step
from raysched.training.wrapping import (
    averaged, is_sharded, load_state, local_state, whole_weights
)
from tests.training.runs import rollout_config

def rank_of(rank, world, strategy, kind, port, answers):
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_PORT=port)
    if world > 1:
        os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1")
    run = build_run(rollout_config(
        scaling__strategy=strategy, scaling__num_workers=world if world > 1 else 0,
        training__batch_size=16, training__gradient_accumulation=2, model__kind=kind,
    ))
    calls, predict = [], run.predict
    def watched(*args, **options):
        calls[-1] += 1
        return predict(*args, **options)
    run.predict = watched
    losses = []
    for step in range(4):
        calls.append(0)
        losses.append(train_step(run, step).loss)
    weights = {k: v.tolist() for k, v in whole_weights(run).items()}
    with averaged(run) as network:
        ema = {k: v.tolist() for k, v in network.state_dict().items()}
    rows = {
        f"{group}/{name}": (p.tensor.tolist(), p.offset, p.shape)
        for group, found in local_state(run).items() for name, p in found.items()
    }
    answers.put((rank, dict(
        wrapper=type(run.network).__name__, sharded=is_sharded(run), losses=losses,
        calls=calls, weights=weights, ema=ema, rows=rows,
    )))

def group_of(world, strategy, kind):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("fork")
    answers = context.SimpleQueue()
    ranks = [
        context.Process(target=rank_of, args=(r, world, strategy, kind, port, answers))
        for r in range(world)
    ]
    for process in ranks:
        process.start()
    found = dict(answers.get() for _ in ranks)
    for process in ranks:
        process.join(60)
    return [found[r] for r in range(world)]

out = {}
for world, strategy, kind in [
    (1, "ddp", "unet"), (2, "ddp", "unet"), (2, "fsdp", "unet"),
    (4, "ddp", "unet"), (4, "fsdp", "unet"), (1, "ddp", "dit"), (2, "fsdp", "dit"),
]:
    out[f"{world} {strategy} {kind}"] = group_of(world, strategy, kind)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def groups() -> dict:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=240,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


CASES = ["2 ddp unet", "2 fsdp unet", "4 ddp unet", "4 fsdp unet", "2 fsdp dit"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_curve_is_that_of_one_process_and_the_wrapper_the_one_asked_for(groups, case):
    _, strategy, kind = case.split()
    (alone,), ranks = groups[f"1 ddp {kind}"], groups[case]
    wanted = "FSDPDenoiser" if strategy == "fsdp" else "DistributedDataParallel"
    for rank in ranks:
        assert rank["wrapper"] == wanted
        assert rank["sharded"] == (strategy == "fsdp")
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5, abs=1e-5)
        assert rank["calls"] == ranks[0]["calls"]
        assert sum(rank["calls"]) > 0
        assert rank["weights"] == ranks[0]["weights"]
    for part in ("weights", "ema"):
        for name, values in alone[part].items():
            mine = torch.tensor(ranks[0][part][name])
            torch.testing.assert_close(mine, torch.tensor(values), rtol=0, atol=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["2 fsdp unet", "4 fsdp unet"])
def test_the_ranks_rows_put_together_are_the_whole_tensors(groups, case):
    ranks = groups[case]
    for name, (_, _, shape) in ranks[0]["rows"].items():
        pieces = sorted((r["rows"][name] for r in ranks), key=lambda piece: piece[1])
        group, _, key = name.partition("/")
        if not shape or group == "optimizer":
            continue
        parts = [torch.tensor(p[0]).reshape(-1, *shape[1:]) for p in pieces]
        whole = torch.tensor(ranks[0]["weights" if group == "model" else "ema"][key])
        assert torch.equal(torch.cat(parts), whole)


def test_gradient_checkpointing_gives_the_same_losses():
    losses = {}
    for on in (False, True):
        run = build_run(rollout_config(model__gradient_checkpointing=on))
        losses[on] = [train_step(run, step).loss for step in range(3)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-6)


def test_fp16_without_a_gpu_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = rollout_config(training__precision="fp16", training__device="auto")
    with pytest.raises(ConfigError, match="use bf16 or fp32"):
        build_run(config)


@pytest.mark.parametrize("changes", [{"exposure": "defar"}, {"scheduled_sampling__policy": "ema"}])
def test_fsdp_refuses_what_gives_the_workers_unequal_forwards(changes):
    with pytest.raises(ConfigError, match="must be ddp"):
        rollout_config(scaling__strategy="fsdp", scaling__num_workers=2, **changes)
