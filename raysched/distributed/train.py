"""`raysched train`: open the run's folder, track it, launch it, and tell its user how it goes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysched.config.paths import anchored, user_path, work_root
from raysched.config.run import RunConfig
from raysched.distributed.grace import GraceOver, grace_period
from raysched.distributed.launch import run_training
from raysched.distributed.live import live_status, speed_words
from raysched.signals import STOP
from raysched.training.checkpoint import checkpoint_folders
from raysched.training.events import note_event
from raysched.training.fetch import check_storage, prepare_storage, stored_run_name
from raysched.training.files import write_json
from raysched.training.protocols import RunStatus, Tracker
from raysched.training.result import RunResult, read_result
from raysched.training.run_folder import (
    CONFIG_FILE,
    check_same_run,
    default_run_dir,
    flatten,
    holds_run,
    latest_run_dir,
    open_run_folder,
    own_run_folder,
    read_config,
)
from raysched.training.stop import clear_stop, request_stop
from raysched.training.upload import upload_finished

PLAN_FILE = "plan.json"

if TYPE_CHECKING:
    from rich.console import Console

    from raysched.tracking import StoreHandle


def train(config: RunConfig, *, resume: bool, console: Console) -> RunResult:
    """Train once, with Ray Train or in this process; SIGTERM and Ctrl-C stop it resumably.

    Args:
        config: the resolved run.
        resume: go on with the run in the folder (without a folder: the newest of this name);
            a folder without one starts anew, a finished run is only read.
        console: where progress is printed.

    Raises:
        StorageError, ConfigError: the folder, the store or the cluster can't be used as asked.
        RunFailedError, LostResourcesError: the workers were lost, or found no room.
    """
    config = anchored(config, Path.cwd())
    run_dir = choose_run_dir(config, resume=resume)
    done = _already_finished(config, run_dir) if resume else None
    if done is not None:
        console.print(f"{run_dir}: this run is finished already")
        upload_finished(config, run_dir, lambda text: console.print(f"warning: {text}"))
        return done

    def on_signal(name: str) -> None:
        request_stop(run_dir, "stopped", name)

    check_storage(config)

    with own_run_folder(run_dir), contextlib.ExitStack() as at_end:
        say = functools.partial(console.print, soft_wrap=True, highlight=False)
        prepare_storage(config, run_dir, resume=resume, say=say)
        open_run_folder(config, run_dir, resume=resume)
        clear_stop(run_dir)
        console.print(f"run folder: {run_dir}", soft_wrap=True)
        STOP.register(on_signal)
        at_end.callback(STOP.unregister, on_signal)
        with (
            _tracking(config, run_dir, console) as make_tracker,
            live_status(console, run_dir),
        ):
            result = _run_tracked(config, run_dir, console, make_tracker)
    for words in speed_words(result.compute):
        console.print(words, soft_wrap=True, highlight=False)
    for note in result.notes:
        console.print(f"warning: {note}", soft_wrap=True, highlight=False)
    return result


def _run_tracked(
    config: RunConfig,
    run_dir: Path,
    console: Console,
    make_tracker: Callable[[], Tracker] | None,
) -> RunResult:
    """Train; where the tracker could not record how it ended, as with lost workers, do so here."""
    status: RunStatus = "failed"
    try:
        with grace_period(config.scaling.grace_s):
            result = run_training(
                config,
                run_dir=run_dir,
                report=functools.partial(_print_evaluation, console),
                make_tracker=make_tracker,
            )
        status = result.status
        return result
    except GraceOver:
        status = "stopped"
        return _out_of_time(config, run_dir)
    except (KeyboardInterrupt, SystemExit):
        status = "stopped"
        raise
    finally:
        if make_tracker is not None:
            from raysched.tracking import note_end

            note_end(run_dir, status)


def _out_of_time(config: RunConfig, run_dir: Path) -> RunResult:
    """The result of a run whose last checkpoint was not written within the grace period."""
    kept = [folder.name for folder in checkpoint_folders(run_dir)]
    text = (
        f"{run_dir}: no checkpoint could be written within {config.scaling.grace_s:g} s of "
        "SIGTERM (scaling.grace_s); the newest is "
        f"{kept[-1] if kept else 'none'}: go on with --resume"
    )
    note_event(run_dir, text)
    return RunResult(status="stopped", output_dir=str(run_dir), error=text)


def choose_run_dir(config: RunConfig, *, resume: bool) -> Path:
    """The absolute folder of a run: as configured, the newest of its name, or a new one."""
    if config.training.output_dir is not None:
        return work_root() / user_path(config.training.output_dir, "training.output_dir")
    latest = latest_run_dir(config.name) if resume else None
    if resume and latest is None and (stored := stored_run_name(config)) is not None:
        return work_root() / "runs" / stored
    return latest or default_run_dir(config.name)


def _already_finished(config: RunConfig, run_dir: Path) -> RunResult | None:
    """A finished run's result; None where there is something left to train.

    Raises:
        ConfigError: the run in the folder was made with other settings.
    """
    done = read_result(run_dir)
    if done is None or done.status != "finished" or not holds_run(run_dir):
        return None
    if read_config(run_dir).training.budget != config.training.budget:
        return None
    check_same_run(config, run_dir)
    return done


@contextlib.contextmanager
def _tracking(
    config: RunConfig, run_dir: Path, console: Console
) -> Iterator[Callable[[], Tracker] | None]:
    """Make the run in the store; yields the maker of rank 0's tracker, None without tracking."""
    if not config.tracking.enabled:
        yield None
        return
    from raysched.tracking import (
        Courier,
        context_tags,
        describe_run,
        prepare_store,
        start_run,
        ui_command,
    )

    store = prepare_store(config.tracking, work_root())
    params = flatten(config.model_dump(mode="json", exclude={"name", "tracking"}))
    run_id = start_run(
        store,
        run_dir.name,
        run_dir=run_dir,
        params={key: value for key, value in params.items() if value is not None},
        tags={"raysched.kind": "run", **context_tags(Path.cwd())},
    )
    describe_run(run_dir)
    console.print(f"MLflow: {ui_command(store)}", soft_wrap=True, highlight=False)
    # The driver waits anyway: it carries the points, so that no worker imports MLflow.
    courier = Courier(store) if config.scaling.num_workers else None
    if courier is not None:
        courier.watch(run_dir)
    try:
        yield functools.partial(make_tracker, store, run_id, run_dir, send=courier is None)
    finally:
        if courier is not None:
            courier.close()


def make_tracker(store: StoreHandle, run_id: str, run_dir: Path, *, send: bool) -> Tracker:
    """Rank 0's tracker, made in its process; config and plan are recorded however the run ends.

    Args:
        store: from `prepare_store`.
        run_id: from `start_run`.
        run_dir: the run's folder.
        send: whether this process sends the points, rather than a courier in the driver.
    """
    from raysched.tracking import MlflowTracker
    from raysched.training.plan import forecast_as_json

    tracker = MlflowTracker(store, run_id, run_dir, send=send)
    tracker.log_artifact(run_dir / CONFIG_FILE)
    config = read_config(run_dir)
    if config.training.budget.seconds is None:
        write_json(run_dir / PLAN_FILE, forecast_as_json(config))
        tracker.log_artifact(run_dir / PLAN_FILE)
    return tracker


def _print_evaluation(console: Console, metrics: Mapping[str, Any]) -> None:
    spent, share = metrics["compute/forward_equivalents"], metrics["compute/fraction"]
    line = f"step {metrics['step']:.0f}, {spent:,.0f} FE ({min(share, 1.0):.0%} of the budget)"
    if "quality/q" in metrics:
        low, high = metrics.get("quality/q_low"), metrics.get("quality/q_high")
        line += f": q {metrics['quality/q']:.5f}"
        line += f" [{low:.5f}, {high:.5f}]" if low is not None and high is not None else ""
    if "quality/recall" in metrics:
        line += f", precision {metrics['quality/precision']:.3f}"
        line += f", recall {metrics['quality/recall']:.3f}"
    console.print(line, highlight=False)
