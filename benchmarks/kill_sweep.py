"""A sweep's driver killed at random moments: no trial lost, none run again past its checkpoint.

A real sweep on the digits is started, its driver gets SIGKILL at a random moment, and it goes on
with `--resume`, so many times; then it may end. The journal and the trials' own logs tell:

  kills           SIGKILLs that hit a running sweep
  lost            trials that were proposed and are not there at the end, or changed their settings
  repeated        trials that had ended and were started again
  past            starts that did not go on from the newest checkpoint at the kill
  went_on         starts that went on from a checkpoint

    python benchmarks/kill_sweep.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from raysched.training.checkpoint import checkpoint_folders, step_of
from raysched.training.events import LOG_FILE
from raysched.tuning.journal import JOURNAL_FILE, apply_event, read_events
from raysched.tuning.records import TrialRecord

SPACE = Path(__file__).parents[1] / "tune_spaces" / "digits_rollout.yaml"
WENT_ON = "went on from step "
# So long may Ray need to start, before the sweep itself does.
START_S = 240.0


def start(folder: Path, trials: int, budget: float, *, resume: bool) -> subprocess.Popen[bytes]:
    """The sweep's command."""
    settings = (
        f"budget_forward_equivalents={budget:g}",
        f"search.num_samples={trials}",
        "search.algorithm=random",
        "early_stopping.kind=none",
        "scaling.num_workers=0",
        "tracking.enabled=false",
        "training.checkpoint_every_steps=10",
        "evaluation.num_samples=50",
        f"output_dir={folder}",
    )
    command = [sys.executable, "-m", "raysched", "tune", str(SPACE), "--json", *settings]
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*command, *(["--resume"] if resume else [])], stdout=log, stderr=log
        )


def records(folder: Path) -> dict[int, TrialRecord]:
    """The trials as the journal has them."""
    found: dict[int, TrialRecord] = {}
    for event in read_events(folder / JOURNAL_FILE):
        apply_event(found, event)
    return found


def newest_step(run_dir: Path) -> int:
    """Step of a run's newest checkpoint, 0 without one."""
    whole = [f for f in checkpoint_folders(run_dir) if (f / "manifest.json").is_file()]
    return step_of(whole[-1]) if whole else 0


def starts(run_dir: Path) -> list[int]:
    """The steps from which a trial's runs went on, in order."""
    path = run_dir / LOG_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [int(line.partition(WENT_ON)[2]) for line in lines if WENT_ON in line]


def begun(folder: Path) -> dict[str, int]:
    """How often each trial was started, by its folder's name."""
    logs = sorted(folder.glob(f"trials/*/{LOG_FILE}"))
    return {log.parent.name: log.read_text().count("started in process") for log in logs}


def wait_for_news(folder: Path, before: int, process: subprocess.Popen[bytes]) -> bool:
    """Whether the sweep has journaled something since it was started."""
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        path = folder / JOURNAL_FILE
        if path.is_file() and path.stat().st_size > before:
            return True
        time.sleep(0.05)
    return False


def run(folder: Path, *, kills: int, trials: int, budget: float, seed: int) -> dict[str, Any]:
    """Kill, resume, and count."""
    generator = random.Random(seed)
    done, past, repeated = 0, 0, 0
    suggested: dict[int, dict[str, Any]] = {}
    resume = False
    while done < kills:
        path = folder / JOURNAL_FILE
        size = path.stat().st_size if path.is_file() else 0
        count, ended = begun(folder), {r.name for r in records(folder).values() if r.ended}
        live = [r for r in records(folder).values() if not r.ended]
        newest = {r.name: newest_step(Path(r.run_dir)) for r in live}
        process = start(folder, trials, budget, resume=resume)
        if not wait_for_news(folder, size, process):
            said = folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
            process.kill()
            raise RuntimeError(f"no news (exit code {process.poll()}); it said: {said[-2000:]}")
        time.sleep(generator.uniform(0.0, 8.0))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        # Its trials notice that the driver is gone; two must never write.
        time.sleep(3.0)
        done, resume = done + 1, True
        now = records(folder)
        suggested.update({n: r.assignments for n, r in now.items() if n not in suggested})
        past += _past(folder, newest)
        after = begun(folder)
        repeated += sum(after.get(name, 0) > count.get(name, 0) for name in ended)
        if all(r.ended for r in now.values()) and len(now) > trials:
            break
    process = start(folder, trials, budget, resume=True)
    code = process.wait()
    end = records(folder)
    lost = [n for n, given in suggested.items() if n not in end or end[n].assignments != given]
    return {
        "kills": done,
        "trials": len(end),
        "exit_code": code,
        "unfinished": sum(not r.ended for r in end.values()),
        "lost": len(lost),
        "repeated": repeated,
        "past": past,
        "went_on": sum(len(starts(Path(r.run_dir))) for r in end.values()),
        "starts": sum(begun(folder).values()),
    }


def _past(folder: Path, newest: dict[str, int]) -> int:
    """Starts of the last session that left out work which a checkpoint held."""
    wrong = 0
    for name, step in newest.items():
        run_dir = folder / "trials" / name
        found = starts(run_dir)
        # A start that was killed before it read the checkpoint has done nothing yet.
        wrong += bool(step and (newest_step(run_dir) < step or (found and found[-1] < step)))
    return wrong


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--budget", type=float, default=38400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        row = run(
            Path(scratch) / "sweep",
            kills=options.kills,
            trials=options.trials,
            budget=options.budget,
            seed=options.seed,
        )
    print(json.dumps(row) if options.json else "  ".join(f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
