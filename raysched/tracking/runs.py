"""Making a run in MLflow exactly once, now or when the store is back, and ending it.

A run's identity is our own `local_id`, a tag in MLflow. Whoever must make a run looks for that tag
first, so that a process killed between making the run and noting its id leaves no second one, and
a child that is sent before its parent can make the parent's place.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from raysched.errors import StorageError
from raysched.tracking.client import (
    UnreachableError,
    connect,
    describe,
    is_refused,
    status_code,
)
from raysched.tracking.recall import recall
from raysched.tracking.spool import OFFLINE_PREFIX, RunRecord, Spool
from raysched.tracking.store import LOGGER, StoreHandle
from raysched.tracking.uris import redact
from raysched.training.protocols import RunStatus

LOCAL_ID_TAG = "raysched.local_id"
STATUS_TAG = "raysched.status"
# A stopped run can be resumed and then goes on under the same id; a pruned one is complete.
MLFLOW_STATUS: dict[str, str] = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "stopped": "KILLED",
    "pruned": "FINISHED",
    "failed": "FAILED",
}
MAX_PARAMS_PER_CALL = 100
_MAX_PARAM_CHARACTERS = 6000
_MAX_TAG_CHARACTERS = 8000
_CUT = "... [cut]"


def now_ms() -> int:
    """Milliseconds since 1970, MLflow's unit of time."""
    return time.time_ns() // 1_000_000


def _cut(value: Any, limit: int) -> str:
    text = redact(str(value))
    return text if len(text) <= limit else text[: limit - len(_CUT)] + _CUT


def clean_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    """Tags as text, without credentials, and cut (with a mark) at MLflow's limit."""
    return {key: _cut(value, _MAX_TAG_CHARACTERS) for key, value in tags.items()}


def clean_params(params: Mapping[str, Any]) -> dict[str, str]:
    """Parameters as text, without credentials, and cut (with a mark) at MLflow's limit."""
    return {key: _cut(value, _MAX_PARAM_CHARACTERS) for key, value in params.items()}


def start_run(
    handle: StoreHandle,
    name: str,
    *,
    run_dir: Path,
    parent_run_id: str | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
) -> str:
    """Make a run; called by the driver, before the trial that fills it starts.

    Args:
        handle: from `prepare_store`.
        name: the run's name in the UI.
        run_dir: the run's folder; `tracking/run.json` is written there. If it already holds the
            record of a run in this store, that run goes on; it is made anew if the store lost it.
        parent_run_id: what `start_run` returned for the parent.
        params: flat settings to compare runs by.
        tags: labels.

    Returns:
        MLflow's run id; an id that begins with "offline-" if the store doesn't answer: it works
        everywhere here, and the run is made when the store is back.

    Raises:
        StorageError: the run folder can't be written.
        ConfigError: the store refuses the run.
    """
    spool = Spool(run_dir)
    record = spool.load_record()
    here = (redact(handle.uri), handle.experiment)
    if record is not None and (record.uri, record.experiment) != here:
        _set_aside(spool)
        record = None
    is_new = record is None
    if record is None:
        record = RunRecord(
            *here,
            local_id=uuid.uuid4().hex,
            name=name,
            parent_run_id=parent_run_id,
            start_time=now_ms(),
            params=clean_params(params or {}),
            tags=clean_tags(tags or {}),
        )
        spool.save_record(record)
    if not handle.offline and (is_new or record.run_id):
        try:
            client = connect(handle.uri)
            if is_new:
                make_run(client, record, handle.experiment_id, look_first=False)
            else:
                _take_up(client, spool, record, handle.experiment_id, parent_run_id)
        except Exception as error:
            from mlflow.exceptions import MlflowException

            # The sender tries again; only what can never work is the user's business now.
            if not isinstance(error, UnreachableError | MlflowException) or is_refused(error):
                raise
            LOGGER.warning("MLflow failed (%s); the run is made there later", describe(error))
        spool.save_record(record)
    return record.public_id


def _set_aside(spool: Spool) -> None:
    """Keep the spool of another store; the run begins anew in this one."""
    number = 1
    while (aside := spool.run_dir / f"tracking-{number}").exists():
        number += 1
    try:
        spool.folder.rename(aside)
    except OSError as error:
        raise StorageError(f"{spool.folder}: can't be moved aside: {error.strerror}") from error
    LOGGER.warning("this run was tracked in another MLflow store; its points are in %s", aside)


def _take_up(
    client: Any, spool: Spool, record: RunRecord, experiment_id: str, parent_run_id: str | None
) -> None:
    """Go on with a run that was made: behind the points that the store has of it, or anew."""
    assert record.run_id is not None
    run = find_run(client, record.run_id)
    if run is None:
        record.parent_run_id = parent_run_id
        renew_run(client, spool, record, experiment_id)
    elif not spool.path.exists():
        recall(client, run, spool)


def find_run(client: Any, run_id: str) -> Any:
    """The run; None if the store answers and has none of this id, or a deleted one."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if status_code(error) != 404:
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def renew_run(client: Any, spool: Spool, record: RunRecord, experiment_id: str) -> str:
    """Make a run anew that its store has lost; everything in the spool counts as unsent again."""
    lost = record.run_id
    run_id = make_run(client, record, experiment_id, look_first=True)
    # In this order: killed in between, the next one finds the run lost once more.
    spool.acknowledge(0)
    spool.save_record(record)
    LOGGER.warning(
        "MLflow at %s has no run %s any more: it is made anew as %s, with what %s holds",
        record.uri,
        lost,
        run_id,
        spool.path,
    )
    return run_id


def make_run(client: Any, record: RunRecord, experiment_id: str, *, look_first: bool) -> str:
    """Make the run of a record, or find the one that was made already; sets `record.run_id`.

    Args:
        client: an MLflow client.
        record: the run; its parameters and tags are sent again in any case (harmless).
        experiment_id: the experiment.
        look_first: search before making; False only for a record that nobody has seen yet.
    """
    from mlflow.entities import Param, RunTag

    parent = record.parent_run_id
    if parent is not None and parent.startswith(OFFLINE_PREFIX):
        parent = _find_or_make(client, experiment_id, parent.removeprefix(OFFLINE_PREFIX))
    tags = {**record.tags, STATUS_TAG: "running", LOCAL_ID_TAG: record.local_id}
    if record.name:
        tags["mlflow.runName"] = record.name
    if parent is not None:
        tags["mlflow.parentRunId"] = parent
    if look_first:
        run_id = _find_or_make(client, experiment_id, record.local_id, record.start_time)
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    else:
        run = client.create_run(experiment_id, start_time=record.start_time or None, tags=tags)
        run_id = run.info.run_id
    items = list(record.params.items())
    for start in range(0, len(items), MAX_PARAMS_PER_CALL):
        chunk = items[start : start + MAX_PARAMS_PER_CALL]
        client.log_batch(run_id, params=[Param(key, value) for key, value in chunk])
    record.run_id = run_id
    return str(run_id)


def _find_or_make(client: Any, experiment_id: str, local_id: str, start_time: int = 0) -> str:
    """The run with this local id; when several make it at once, all settle on the first."""
    found = _runs_of(client, experiment_id, local_id)
    if not found:
        tags = {LOCAL_ID_TAG: local_id}
        made = client.create_run(experiment_id, start_time=start_time or now_ms(), tags=tags)
        found = _runs_of(client, experiment_id, local_id)
        if made.info.run_id != found[0]:
            client.delete_run(made.info.run_id)
    return found[0]


def _runs_of(client: Any, experiment_id: str, local_id: str) -> list[str]:
    runs = client.search_runs(
        [experiment_id], filter_string=f"tags.`{LOCAL_ID_TAG}` = '{local_id}'", max_results=10
    )
    runs = sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))
    return [str(run.info.run_id) for run in runs]


def status_operation(status: RunStatus | Literal["running"]) -> dict[str, Any]:
    """The spool's line for a change of status."""
    return {"op": "status", "time": now_ms(), "status": status}


def set_status(client: Any, run_id: str, status: str, time_ms: int) -> None:
    """Show the status in MLflow, as its own and as the tag `raysched.status`."""
    client.set_tag(run_id, STATUS_TAG, status)
    if status == "running":
        client.update_run(run_id, status=MLFLOW_STATUS[status])
    else:
        client.set_terminated(run_id, status=MLFLOW_STATUS[status], end_time=time_ms)
