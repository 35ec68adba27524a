"""The loop on several gloo ranks, each a process of its own, without Ray."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 230
LOOP = """
import json, sys
from pathlib import Path
from raysched.training import stop
from tests.training.runs import rollout_config, run_loop
from tests.training.test_resume import StopAt

stop.POLL_S = 0.0
changes, run_dir, step = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
result = run_loop(rollout_config(**changes), run_dir, tracker=StopAt(run_dir, step))
print(json.dumps(result.as_json()))
"""

# A rank whose process ends while the other still talks to it is now and then aborted.
LEAVE = """
import torch
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def start_ranks(script: str, arguments: list[str], num_ranks: int) -> list[subprocess.Popen]:
    """Start a script once per rank, as torchrun would; the ranks find each other by a port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num_ranks)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", script + LEAVE, *arguments],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                **place,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]


def answers(ranks: list[subprocess.Popen]) -> list[Any]:
    """The JSON in each rank's last line of output."""
    found = []
    try:
        for process in ranks:
            text, errors = process.communicate(timeout=LIMIT_S)
            assert process.returncode == 0, errors
            found.append(json.loads(text.splitlines()[-1]))
    finally:
        # Where one failed, the others wait for it.
        for process in ranks:
            process.kill()
            process.wait()
    return found


def run_loop_on(
    num_ranks: int, changes: dict[str, Any], run_dir: Path, *, stop_at: int = -1
) -> dict[str, Any]:
    """Train (or go on) in a folder on several ranks; the result of rank 0.

    Args:
        num_ranks: processes.
        changes: keywords of `rollout_config`.
        run_dir: the run's folder.
        stop_at: step after which a stop is asked for; -1: never.
    """
    arguments = [json.dumps(changes), str(run_dir), str(stop_at)]
    first: dict[str, Any] = answers(start_ranks(LOOP, arguments, num_ranks))[0]
    return first
