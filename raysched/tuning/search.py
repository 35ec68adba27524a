"""The search: Ray Tune runs the trials that the searcher proposes and the scheduler prunes."""

from __future__ import annotations

import functools
import logging
import math
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from raysched.config.loading import assign, baseline_config
from raysched.config.run import RunConfig
from raysched.config.space import LoadedSweep
from raysched.distributed.resources import (
    RoomWatch,
    StoppedWaitingError,
    bundle,
    check_resources,
    living_nodes,
)
from raysched.distributed.runtime import ensure_ray, started_here
from raysched.errors import ConfigError
from raysched.training.stop import request_stop
from raysched.tuning.display import Progress
from raysched.tuning.journal import Journal
from raysched.tuning.measuring import measure_trials, unreported
from raysched.tuning.objectives import Objectives, sweep_objectives
from raysched.tuning.store import SweepStore
from raysched.tuning.trial import TrialPlan, run_trial

# A stopping trial saves a checkpoint after its current step or evaluation.
PATIENCE_S = 120.0
# Runs of Tune in one session: more than the first only for trials that were lost at its end.
MAX_ROUNDS = 3


def remaining_trials(loaded: LoadedSweep, journal: Journal) -> int:
    """How many trials a session has to run at most."""
    records = journal.records.values()
    unfinished = sum(not record.ended for record in records)
    baselines = sum(record.baseline for record in records)
    wanted = loaded.sweep.search.num_samples
    new = max(0, wanted - (len(records) - baselines))
    missing = max(0, (wanted if loaded.tunes_baseline else 1) - baselines)
    return unfinished + new + missing


def hopeless(journal: Journal, objectives: Objectives) -> str | None:
    """Why a sweep can't be judged whatever else is trained; None if it can.

    The baseline failed, which all trials are compared with, or the trials that have finished lack
    an objective.
    """
    baseline = journal.records.get(0)
    if baseline is not None and baseline.status == "failed":
        return f"the baseline failed: {baseline.error}"
    q = baseline.q if baseline is not None and baseline.status == "finished" else None
    if q is not None and not math.isfinite(q):
        return "the baseline failed: its quality is not a number"
    return unreported(objectives, journal.ordered())


def max_concurrent(
    config: RunConfig, nodes: Sequence[Mapping[str, float]], limit: int | None
) -> int:
    """Trials at once: as many as the cluster carries, at most `limit`.

    Args:
        config: the base run.
        nodes: resources of each living node; a worker never spans two.
        limit: the user's.

    Raises:
        ConfigError: not even one fits.
    """
    scaling = config.scaling
    workers = max(1, scaling.num_workers)
    one = bundle(scaling)
    for name, each in one.items():
        need, have = workers * each, sum(node.get(name, 0.0) for node in nodes)
        if need > have:
            less = "set scaling.use_gpu to false" if name == "GPU" else "scaling.cpus_per_worker"
            raise ConfigError(
                f"scaling: each trial needs {need:g} {name}s, the cluster has {have:g}: lower "
                f"scaling.num_workers or {less}"
            )
    fit = sum(min(int(node.get(n, 0.0) // each) for n, each in one.items()) for node in nodes)
    if fit < workers:
        words = " and ".join(f"{each:g} {name}s" for name, each in one.items())
        raise ConfigError(
            f"scaling: each trial needs {workers} workers of {words}, each on one node, and only "
            f"{fit} fit on the cluster's nodes: lower scaling.num_workers or "
            "scaling.cpus_per_worker"
        )
    return min(fit // workers, limit) if limit else fit // workers


def trials_at_once(loaded: LoadedSweep, console: Console) -> int:
    """Trials that are kept running or waiting.

    A cluster that others started may be empty now and grow for trials that wait: there the user's
    number stands, whatever fits today.
    """
    config, limit = loaded.base.config, loaded.sweep.search.max_concurrent
    if limit is not None and not started_here():
        return limit
    fit = max_concurrent(config, living_nodes(), limit)
    if not started_here():
        console.print(
            f"{fit} trials at once, as many as fit on the cluster's present nodes: "
            "search.max_concurrent=N keeps N running or waiting, for which it can grow",
            soft_wrap=True,
            highlight=False,
        )
    return fit


def wait_for_room(config: RunConfig, console: Console, *, begun: bool) -> None:
    """Have a cluster that may still grow hold one trial.

    Args:
        config: the base run.
        console: told what is waited for.
        begun: whether trials have run already; then it waits as long as it takes.

    Raises:
        StoppedWaitingError: the sweep was asked to stop first.
        ConfigError: not one trial fits.
    """
    ensure_ray()
    if started_here():
        return
    scaling = config.scaling
    if begun:
        scaling = scaling.model_copy(update={"resource_timeout_s": None})
    check_resources(scaling, functools.partial(console.print, soft_wrap=True, highlight=False))


def trial_resources(config: RunConfig) -> dict[str, float]:
    """What Tune reserves for a trial's own process.

    With workers, these have a placement group of their own; a CPU for their driver as well would
    let two trials wait for each other for ever.
    """
    if config.scaling.num_workers >= 1:
        return {"CPU": 0, "node:__internal_head__": 0.001}
    gpu = {"GPU": 1.0} if config.scaling.use_gpu else {}
    return {"CPU": config.scaling.cpus_per_worker, **gpu}


def search(
    loaded: LoadedSweep,
    journal: Journal,
    plan: TrialPlan,
    store: SweepStore | None,
    console: Console,
) -> bool:
    """Run what is left to run; True if the sweep was asked to stop.

    Tune is done once its searcher has had nothing more to suggest: a trial that is lost with its
    node after that is run by another round.
    """
    objectives = sweep_objectives(loaded.sweep.objective, loaded.base.config, plan.budget)
    # A driver that was killed may have journaled an end without its objectives.
    measure_trials(journal, objectives)
    for number in range(MAX_ROUNDS):
        if not remaining_trials(loaded, journal) or hopeless(journal, objectives) is not None:
            return False
        try:
            wait_for_room(loaded.base.config, console, begun=number > 0)
        except StoppedWaitingError:
            return True
        if _search_round(loaded, journal, plan, objectives, store, console):
            return True
        if all(record.ended for record in journal.ordered()):
            return False
    return False


def _search_round(
    loaded: LoadedSweep,
    journal: Journal,
    plan: TrialPlan,
    objectives: Objectives,
    store: SweepStore | None,
    console: Console,
) -> bool:
    """One run of Tune over what is left; True if the sweep was asked to stop."""
    num_trials = remaining_trials(loaded, journal)
    from raysched.tuning.monitor import Monitor
    from raysched.tuning.searcher import TrialSearcher
    from raysched.tuning.stopping import SweepStopper, stop_on_signals

    concurrent = trials_at_once(loaded, console)
    stopper = SweepStopper(
        plan.stop_file, functools.partial(_live_folders, journal, plan), patience_s=PATIENCE_S
    )
    searcher = TrialSearcher(
        loaded.sweep,
        journal,
        folder=plan.folder / "trials",
        structure=loaded.structure,
        shared=loaded.structure.beside_the_method() if loaded.tunes_baseline else None,
        objectives=objectives,
        allowed=functools.partial(allowed, plan),
        open_run=functools.partial(store.open_run, plan=plan) if store else lambda _: "",
        stopping=lambda: stopper.stopping,
    )
    say = functools.partial(console.print, soft_wrap=True, highlight=False)
    with Progress(console, budget=plan.budget, records=journal.ordered) as progress:
        monitor = Monitor(
            journal,
            searcher.tell,
            show=progress.show,
            close_run=store.close_run if store else lambda _: None,
            measure=functools.partial(measure_trials, journal, objectives),
            fixed_seconds=searcher.fixed_seconds,
            requeue=searcher.requeue,
            look=RoomWatch(loaded.base.config.scaling, say).look,
            check=functools.partial(_give_up, journal, objectives, stopper),
        )
        scheduler = make_scheduler(loaded, journal, plan, objectives)
        with stop_on_signals(stopper):
            _tune(loaded, plan, searcher, scheduler, monitor, stopper, num_trials, concurrent)
    return stopper.stopping


def _give_up(journal: Journal, objectives: Objectives, stopper: Any) -> None:
    reason = hopeless(journal, objectives)
    if reason is not None:
        stopper.request(reason)


def _tune(
    loaded: LoadedSweep,
    plan: TrialPlan,
    searcher: Any,
    scheduler: Any,
    monitor: Any,
    stopper: Any,
    num_trials: int,
    concurrent: int,
) -> None:
    from ray import tune

    def trial(config: dict[str, Any]) -> None:
        run_trial(config, plan)

    # Signals are the driver's business: Tune's own handler would kill the trials.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # A trial's failure is in the journal and on the screen, without Tune's traceback.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # Nothing that Tune writes is needed later: the journal and the trials' folders are.
    name = f".ray-{uuid.uuid4().hex[:8]}"
    tuner = tune.Tuner(
        tune.with_resources(trial, trial_resources(loaded.base.config)),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            # The searcher knows when there is nothing left; trials of lost nodes come again.
            num_samples=2 * num_trials + 10,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(plan.folder),
            stop=stopper,
            verbose=0,
            callbacks=[monitor],
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(plan.folder / name, ignore_errors=True)


def make_scheduler(
    loaded: LoadedSweep, journal: Journal, plan: TrialPlan, objectives: Objectives
) -> Any:
    """Early stopping by what the sweep asks for, with what the journal knows already."""
    from ray.tune.schedulers import FIFOScheduler

    from raysched.tuning.scheduler import ComputeHalving

    early = loaded.sweep.early_stopping
    if early.kind == "none":
        return FIFOScheduler()

    def prune(number: int, run_dir: str, reason: str) -> None:
        journal.append("pruning", number, reason=reason)
        request_stop(Path(run_dir), "pruned", reason)

    scheduler = ComputeHalving(
        early,
        budget=plan.budget,
        prune=prune,
        losses=objectives.losses_at,
        by="" if objectives.ranks_by_q else objectives.names[0],
        interval=objectives.terms.interval,
    )
    scheduler.replay(journal.ordered())
    return scheduler


def allowed(plan: TrialPlan, settings: dict[str, Any], *, baseline: bool) -> bool:
    """Whether the run model accepts the settings, as a candidate's or as the baseline's."""
    try:
        (baseline_config if baseline else assign)(plan.raw, settings)
    except ConfigError:
        return False
    return True


def _live_folders(journal: Journal, plan: TrialPlan) -> list[Path]:
    return [
        folder
        for record in journal.ordered()
        if record.status == "running"
        for folder in plan.run_dirs(record.as_trial())
    ]
