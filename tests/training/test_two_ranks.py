"""Rollout options on two ranks: the numbers of one process, and as many network calls on each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from raysched.training.setup import build_run
from raysched.training.train_step import train_step
from tests.training.runs import rollout_config

run, sizes = build_run(rollout_config(**json.loads(sys.argv[1]))), []
predict = run.predict

def watched(sample, timestep, class_labels, **options):
    sizes.append(len(sample))
    return predict(sample, timestep, class_labels, **options)

run.predict = watched
steps = []
for step in range(4):
    sizes.clear()
    result = train_step(run, step)
    steps.append([len(sizes), result.loss, result.grad_norm])
print(json.dumps({"steps": steps, "spent": run.meter.forward_equivalents}))
"""
ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [
    # Few rollouts: often one rank has none, and must make the other's number of calls.
    {"reuse": "all", "max_step_offset": 6, "probability": 0.2},
    {"grid": "jump", "jump_gradient": True},
    {"guidance_scale": 2.0, "stratified": True, "sampler": "rk4", "probability": 0.3},
]


def train(options: dict, **place: str) -> subprocess.Popen:
    flat = {f"scheduled_sampling__{key}": value for key, value in options.items()}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(flat)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **place},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen) -> dict:
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(text.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_two_ranks_train_on_the_same_rows_with_equally_many_calls(options):
    alone = answer(train(options))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [train(options, **place, RANK=r, LOCAL_RANK=r) for r in ("0", "1")]
    first, second = map(answer, ranks)
    assert first == second
    assert first["spent"] == alone["spent"]
    assert sum(calls for calls, _, _ in first["steps"]) > 0
    for mine, theirs in zip(first["steps"], alone["steps"], strict=True):
        assert mine[1:] == pytest.approx(theirs[1:], rel=1e-4)
