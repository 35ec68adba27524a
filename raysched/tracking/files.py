"""Adding files to a run in MLflow after it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raysched.errors import UserError
from raysched.tracking.spool import Spool
from raysched.tracking.sync import sync


def log_files(
    run_dir: Path, files: Sequence[Path], *, folder: str, timeout_s: float = 30.0
) -> str:
    """Add files to the MLflow run of a run's folder; nothing happens if it wasn't tracked.

    The files are noted in the spool first: if the store doesn't answer, `raysched sync` sends
    them later. A run that is still training goes on undisturbed.

    Args:
        run_dir: the run's folder.
        files: they must stay where they are until they are sent.
        folder: where in the run's artifacts.
        timeout_s: seconds to try.

    Returns:
        What went wrong, in one line; empty if all is well.
    """
    spool = Spool(run_dir)
    try:
        if spool.load_record() is None:
            return ""
        for path in files:
            operation = {"op": "artifact", "path": spool.relative(path), "folder": folder}
            spool.append(operation)
        spool.sync_to_disk()
        spool.close()
        report = sync(run_dir, timeout_s=timeout_s)
    except (UserError, OSError) as error:
        return str(error)
    if report.problems or report.num_remaining:
        return (
            f"{'; '.join(report.problems) or 'no time left'}; send with: raysched sync {run_dir}"
        )
    return ""
