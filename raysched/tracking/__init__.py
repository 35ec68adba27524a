"""MLflow: the only room that knows it. Importing this loads no MLflow.

The driver: `prepare_store`, `start_run` for the sweep and each trial, a `Courier` that sends what
trials record, `finish_run`. A trial: `MlflowTracker`. Afterwards: `ui_command`, `sync`.
"""

from raysched.tracking.context import context_tags
from raysched.tracking.courier import Courier
from raysched.tracking.runs import start_run
from raysched.tracking.store import StoreHandle, prepare_store, ui_command
from raysched.tracking.sync import (
    SyncReport,
    describe_run,
    finish_run,
    note,
    note_end,
    recorded_run,
    sync,
)
from raysched.tracking.tracker import MlflowTracker

__all__ = [
    "Courier",
    "MlflowTracker",
    "StoreHandle",
    "SyncReport",
    "context_tags",
    "describe_run",
    "finish_run",
    "note",
    "note_end",
    "prepare_store",
    "recorded_run",
    "start_run",
    "sync",
    "ui_command",
]
