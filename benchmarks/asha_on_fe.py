"""What ASHA on forward equivalents would have spent, and whom it would have found.

A sweep is trained once without early stopping, evaluated at every possible rung. Over its recorded
curves every setting of ASHA is replayed by the rule that real sweeps use, two trials at a time,
counting the compute that they would have got.

  share                FE of the replayed sweep's candidates over those of the full one's
  share_with_baseline  the same with the baseline, which is never pruned, in both sums
  same                 it ends with the full sweep's best candidate
  tied                 or with one whose paired interval to that best holds zero

    python benchmarks/asha_on_fe.py --json                 # trains 20 trials on the digits first
    python benchmarks/asha_on_fe.py --sweep FOLDER --json  # replays a sweep that is there
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from raysched.config.sweep import EarlyStoppingConfig
from raysched.tuning.journal import JOURNAL_FILE, apply_event, read_events
from raysched.tuning.records import TrialRecord
from raysched.tuning.replay import replay

SPACE = Path(__file__).parents[1] / "tune_spaces" / "digits_rollout.yaml"
GRACES, FACTORS, EVALUATIONS = (0.25, 0.125), (2.0, 3.0, 4.0), 8


def train(folder: Path, num_trials: int, budget: float) -> None:
    """The full sweep, evaluated often."""
    settings = (
        f"budget_forward_equivalents={budget:g}",
        f"evaluation.every_forward_equivalents={budget / EVALUATIONS:g}",
        f"search.num_samples={num_trials}",
        "search.algorithm=random",
        "early_stopping.kind=none",
        "scaling.num_workers=0",
        "tracking.enabled=false",
        f"output_dir={folder}",
    )
    command = [sys.executable, "-m", "raysched", "tune", str(SPACE), *settings]
    subprocess.run(command, check=True, stdout=sys.stderr)


def read_trials(folder: Path) -> list[TrialRecord]:
    """The sweep's trials that reached the budget, by number, the baseline first."""
    records: dict[int, TrialRecord] = {}
    for event in read_events(folder / JOURNAL_FILE):
        apply_event(records, event)
    return [records[n] for n in sorted(records) if records[n].status == "finished"]


def tied(folder: Path, best: TrialRecord, found: TrialRecord) -> bool:
    """Whether the paired interval between two trials holds zero."""
    from raysched.config.loading import load
    from raysched.tuning.compare import compare_with_baseline

    config = load(folder / "base.yaml").config
    (difference,) = compare_with_baseline(found, [best], config=config, seeds=(0,))
    return difference.low <= 0 <= difference.high


def rows(folder: Path) -> list[dict[str, Any]]:
    """A row per setting of ASHA."""
    trials = [t for t in read_trials(folder) if t.curve]
    candidates = [t for t in trials if not t.baseline]
    budget = max(t.curve[-1].forward_equivalents for t in candidates) * 0.99
    full = sum(t.curve[-1].forward_equivalents for t in candidates)
    forced = sum(t.curve[-1].forward_equivalents for t in trials if t.baseline)

    def quality(trial: TrialRecord) -> float:
        return trial.q if trial.q is not None else float("inf")

    best, found = min(candidates, key=quality), []
    for grace, factor in itertools.product(GRACES, FACTORS):
        early = EarlyStoppingConfig(grace_fraction=grace, reduction_factor=factor)
        curves = {t.number: [(p.forward_equivalents, (p.q,)) for p in t.curve] for t in candidates}
        spent, survivors = replay(curves, early, budget, concurrent=2)
        chosen = min((t for t in candidates if t.number in survivors), key=quality)
        same, left = chosen is best, sum(spent.values())
        found.append(
            {
                "grace": round(grace, 4),
                "factor": factor,
                "trials": len(candidates),
                "share": round(left / full, 4),
                "share_with_baseline": round((left + forced) / (full + forced), 4),
                "same": same,
                "tied": same or tied(folder, best, chosen),
                "winner": chosen.number,
                "best": best.number,
            }
        )
    return found


def main() -> None:
    """Train unless a sweep is given, replay, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", type=Path)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--budget", type=float, default=76800)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.sweep or Path(scratch) / "sweep"
        if options.sweep is None:
            train(folder, options.trials, options.budget)
        result = rows(folder.resolve())
    if options.json:
        print(json.dumps({"rows": result}))
        return
    for row in result:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
