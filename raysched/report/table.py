"""The trials as files for spreadsheets and scripts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from raysched.training.events import LOG_FILE
from raysched.tuning.display import status_text, swept_keys
from raysched.tuning.records import SweepResult

COLUMNS = (
    "q",
    "q_low",
    "q_high",
    "q_epsilon_scaled",
    "forward_equivalents",
    "seconds",
    "run_dir",
    "log",
    "error",
)


def table_rows(result: SweepResult) -> list[dict[str, Any]]:
    """One flat row per trial: name, settings by dotted key, quality, compute, status."""
    keys = swept_keys(result.trials)
    winner = result.winner.number if result.winner else None
    rows = []
    for trial in result.trials:
        values = {**trial.as_json(), "log": str(Path(trial.run_dir) / LOG_FILE)}
        rows.append(
            {
                "trial": trial.name,
                "baseline": trial.baseline,
                "winner": trial.number == winner,
                "status": status_text(trial),
                **{key: trial.assignments.get(key) for key in keys},
                **{column: values[column] for column in COLUMNS},
            }
        )
    return rows


def write_csv(result: SweepResult, path: Path) -> Path:
    """Write the rows as CSV."""
    rows = table_rows(result)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]) if rows else ["trial"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json_table(result: SweepResult, path: Path) -> Path:
    """Write the rows as a JSON list."""
    path.write_text(json.dumps(table_rows(result), indent=1) + "\n", encoding="utf-8")
    return path
