"""What a run ends with, as an object and as the JSON that scripts read."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raysched.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUMABLE
from raysched.training.protocols import RunStatus

RESULT_FILE = "result.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """The end of a run.

    Attributes:
        status: finished (budget spent), stopped (resumable), pruned (by its sweep) or failed.
        output_dir: the run's folder.
        metrics: those of the last evaluation and the last training loss.
        compute: forward equivalents (rollout and training), their parts, seconds, memory, disk.
        weights_sha256: digest of the online weights.
        error: why the run failed, in one line.
        diverged: it failed because its numbers stopped being finite.
        notes: what else the user should know, e.g. what could not be uploaded.
    """

    status: RunStatus
    output_dir: str
    metrics: dict[str, float] = field(default_factory=dict)
    compute: dict[str, float] = field(default_factory=dict)
    weights_sha256: str = ""
    error: str | None = None
    diverged: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """The process exit code that goes with the status."""
        return {"finished": EXIT_OK, "pruned": EXIT_OK, "stopped": EXIT_RESUMABLE}.get(
            self.status, EXIT_FAILED
        )

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON types; NaN and infinities become null."""
        content: dict[str, Any] = finite_json(asdict(self))
        return content


def finite_json(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by None, at any depth."""
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_result(run_dir: Path) -> RunResult | None:
    """The stored result of a run's folder, None where the run has not ended yet.

    A damaged file counts as none, with a warning: `--resume` makes it anew from the checkpoints.
    """
    path = run_dir / RESULT_FILE
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored["metrics"] = {
            key: math.nan if value is None else value for key, value in stored["metrics"].items()
        }
        return RunResult(**stored)
    except (ValueError, TypeError, KeyError, AttributeError):
        log.warning("%s: damaged, passed over; --resume of its run makes it anew", path)
        return None
