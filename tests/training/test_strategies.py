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
from tests.training.runs import rollout_config, small_config

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
from tests.training.runs import rollout_config, small_config

KINDS = {
    "unet": {},
    "dit": {"model__kind": "dit"},
    # Methods whose ranks would make unequal numbers of calls, with and without gradient.
    "reuse": {
        "scheduled_sampling__reuse": "all", "scheduled_sampling__max_step_offset": 6,
        "scheduled_sampling__probability": 0.3, "training__gradient_accumulation": 4,
    },
    "ema": {"scheduled_sampling__policy": "ema", "scheduled_sampling__guidance_scale": 2.0},
    "self_correction": {"exposure": "self_correction", "training__gradient_accumulation": 4},
    "defar": {"exposure": "defar"},
    "guided": {
        "scheduled_sampling__guidance_scale": 2.0, "scheduled_sampling__stratified": True,
        "scheduled_sampling__sampler": "rk4", "scheduled_sampling__probability": 0.3,
    },
    "jump": {"scheduled_sampling__grid": "jump", "scheduled_sampling__jump_gradient": True},
}

def make_config(kind, **settings):
    changes = {**settings, **KINDS[kind]}
    # Settings of scheduled sampling have no place beside another method.
    return (small_config if "exposure" in changes else rollout_config)(**changes)

def rank_of(rank, world, strategy, kind, port, answers):
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_PORT=port)
    if world > 1:
        os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1")
    run = build_run(make_config(
        kind, scaling__strategy=strategy, scaling__num_workers=world if world > 1 else 0,
        training__batch_size=16, training__gradient_accumulation=2,
    ))
    calls, trained, predict = [], [], run.predict
    run.network.register_forward_pre_hook(lambda *_: trained.append(torch.is_grad_enabled()))
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
        calls=calls, trained=sum(trained), spent=run.meter.forward_equivalents,
        weights=weights, ema=ema, rows=rows,
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
    *((w, s, k) for k in list(KINDS)[2:-1] for w, s in ((1, "ddp"), (2, "ddp"), (4, "fsdp"))),
    (1, "ddp", "jump"), (2, "ddp", "jump"),
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
        timeout=560,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


CASES = ["2 ddp unet", "2 fsdp unet", "4 ddp unet", "4 fsdp unet", "2 fsdp dit"]
METHODS = ["reuse", "ema", "self_correction", "defar", "guided"]
CASES += [f"{group} {method}" for method in METHODS for group in ("2 ddp", "4 fsdp")]
CASES += ["2 ddp jump"]


@pytest.mark.slow
@pytest.mark.timeout(600)
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
        assert rank["trained"] == ranks[0]["trained"] > 0
        assert sum(rank["calls"]) > 0
        assert rank["spent"] == alone["spent"]
        assert rank["weights"] == ranks[0]["weights"]
    for part in ("weights", "ema"):
        for name, values in alone[part].items():
            mine = torch.tensor(ranks[0][part][name])
            torch.testing.assert_close(mine, torch.tensor(values), rtol=0, atol=5e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
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


@pytest.mark.parametrize("exposure", ["scheduled_sampling", "defar"])
def test_fsdp_refuses_jumps_that_keep_their_gradient(exposure):
    changes: dict = {f"{exposure}__jump_gradient": True, "exposure": exposure}
    if exposure == "scheduled_sampling":
        changes |= {"scheduled_sampling__grid": "jump", "scheduled_sampling__max_step_offset": 1}
        changes |= {"scheduled_sampling__probability": 0.5}
    with pytest.raises(ConfigError, match=rf"must be ddp with {exposure}.jump_gradient"):
        small_config(scaling__strategy="fsdp", scaling__num_workers=2, **changes)
