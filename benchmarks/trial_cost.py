"""What a trial costs beside its training: in a process that is taken over, and with a trainer.

Two small sweeps on the digits, two trials at a time unless told otherwise. With
`scaling.num_workers: 0` a trial trains in its own process, with `1` in a Ray Train worker that it
starts. Both are measured by the sweep itself (`result.json`, `fixed_cost`), from a trial's
proposal to the entry of its end, less training, evaluation and checkpoints. Aims: 4 s in processes
that are warm, 12 s with a trainer.

  new_process   seconds, trials whose process had to be started
  later         seconds, trials that took one over
  work          seconds of training and evaluation, beside which that is to be small

    python benchmarks/trial_cost.py --json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SPACE = Path(__file__).parents[1] / "tune_spaces" / "digits_rollout.yaml"
AIMS = {0: 4.0, 1: 12.0}


def measure(num_workers: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One sweep's fixed cost per trial."""
    settings = (
        f"budget_forward_equivalents={options.budget:g}",
        f"search.num_samples={options.trials}",
        "search.algorithm=random",
        f"search.max_concurrent={options.max_concurrent}",
        "early_stopping.kind=none",
        "evaluation.num_samples=50",
        "evaluation.final_num_samples=100",
        f"scaling.num_workers={num_workers}",
        "tracking.enabled=false",
        f"output_dir={folder}",
    )
    command = [sys.executable, "-m", "raysched", "tune", str(SPACE), "--json", *settings]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    cost = json.loads(done.stdout)["fixed_cost"]
    return {
        "num_workers": num_workers,
        "at_once": options.max_concurrent,
        "new_process": round(cost["new_process_s"], 2),
        "later": round(cost["later_s"], 2),
        "later_trials": cost["num_later"],
        "work": round(cost["work_s"], 2),
        "later_over_work": round(cost["later_s"] / cost["work_s"], 3),
        "aim": AIMS[num_workers],
    }


def main() -> None:
    """Print a row per way of training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=7)
    parser.add_argument("--budget", type=float, default=5760)
    parser.add_argument("--max-concurrent", type=int, default=2, help="trials at a time")
    parser.add_argument("--num-workers", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = [measure(n, options, Path(scratch) / f"{n}") for n in options.num_workers]
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
