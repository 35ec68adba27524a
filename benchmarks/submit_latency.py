"""From `raysched submit` to the first training step on a warm cluster of this machine.

    python benchmarks/submit_latency.py --json

Starts a head by cluster/local, warms it by one job, and times `--repeats` further ones: until the
server has the job (ours), until its command starts (Ray's), until the first step is logged (Ray
Train's workers, imports and the set-up of the model). Also times `raysched --help`.
Limits: 25 s in all, 3 s of it ours; 0.4 s for --help.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SETTINGS = (
    "name=latency",
    "data.source=digits",
    "training.budget.steps=2",
    "training.log_every_steps=1",
    "evaluation.enabled=false",
    "tracking.enabled=false",
)
LIMIT_S, OWN_LIMIT_S, HELP_LIMIT_S = 25.0, 3.0, 0.4


def head(verb: str, environment: dict[str, str]) -> str:
    command = [str(ROOT / "cluster" / "local"), verb]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=120
    ).stdout


def submit(number: int, folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Seconds from the command's start: accepted, first step logged."""
    runs = folder / "runs"
    before = set(runs.glob("*"))
    began = time.time()
    subprocess.run(
        [BIN / "raysched", "submit", "train", *SETTINGS, f"seed={number}", "--detach"],
        env=environment,
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=60,
    )
    accepted = time.time() - began
    while time.time() - began < 120:
        for metrics in runs.glob("*/metrics.jsonl"):
            if metrics.parent not in before and metrics.stat().st_size:
                first = time.time() - began
                wait_for_end(metrics.parent)
                return {"accepted_s": accepted, "first_step_s": first}
        time.sleep(0.02)
    raise TimeoutError("no training step within 120 s")


def wait_for_end(run: Path) -> None:
    until = time.monotonic() + 60
    while not (run / "result.json").exists():
        if time.monotonic() > until:
            raise TimeoutError(f"{run} did not end within 60 s")
        time.sleep(0.1)


def help_seconds() -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([BIN / "raysched", "--help"], capture_output=True, check=True, timeout=60)
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=28265)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rs-") as name:
        folder = Path(name)
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAYSCHED_HEAD": str(folder / "h"),
            "RAYSCHED_ROOT": str(folder),
            "RAYSCHED_DASHBOARD_PORT": str(options.port),
            "RAYSCHED_HEAD_PORT": str(options.port + 6),
        }
        settings = dict(re.findall(r"(RAY_[A-Z_]+)=(\S+)", head("start", environment)))
        try:
            client = {**environment, **settings}
            submit(0, folder, client)
            found = [submit(1 + n, folder, client) for n in range(options.repeats)]
        finally:
            head("stop", environment)
    accepted = sorted(one["accepted_s"] for one in found)[len(found) // 2]
    first = sorted(one["first_step_s"] for one in found)[len(found) // 2]
    result = {
        "accepted_s": accepted,
        "first_step_s": first,
        "limit_s": LIMIT_S,
        "own_limit_s": OWN_LIMIT_S,
        "help_s": help_seconds(),
        "help_limit_s": HELP_LIMIT_S,
        "runs": found,
    }
    if options.json:
        print(json.dumps(result))
        return
    print(f"submit to accepted (ours) {accepted:6.2f} s  limit {OWN_LIMIT_S}")
    print(f"submit to first step      {first:6.2f} s  limit {LIMIT_S}")
    print(f"raysched --help           {result['help_s']:6.2f} s  limit {HELP_LIMIT_S}")


if __name__ == "__main__":
    main()
