"""A sweep from its first trial to its verdict.

The driver proposes, prunes, journals and compares; trials train in processes that Ray places. What
the journal holds survives a kill of the driver, and `--resume` goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console

from raysched.config.loading import write_yaml
from raysched.config.paths import anchored
from raysched.config.run import RunConfig
from raysched.config.space import LoadedSweep
from raysched.training.events import LOG_FILE
from raysched.training.fetch import check_storage
from raysched.training.files import storage_errors, write_json
from raysched.training.initial import pin_base, shared_base
from raysched.tuning.compare import compare_with_baseline, metric_name
from raysched.tuning.fixed_cost import fixed_cost
from raysched.tuning.folder import open_sweep_folder, sweep_folder
from raysched.tuning.journal import Journal
from raysched.tuning.measuring import measure_trials, pareto_summary
from raysched.tuning.objectives import sweep_objectives
from raysched.tuning.records import SweepResult, TrialRecord
from raysched.tuning.search import hopeless, remaining_trials, search
from raysched.tuning.store import open_store
from raysched.tuning.trial import Train, TrialPlan, rolls_out, train_run
from raysched.tuning.verdict import Comparison, best, decide, eligible

RESULT_FILE = "result.json"

ReportWriter = Callable[[SweepResult, RunConfig], dict[str, str]]


class Compare(Protocol):
    """Compares candidates with the baseline on what their runs saved."""

    def __call__(
        self,
        baseline: TrialRecord,
        candidates: Sequence[TrialRecord],
        *,
        config: RunConfig,
        seeds: Sequence[int],
    ) -> list[Comparison]:
        """One comparison per candidate."""


def run_sweep(
    loaded: LoadedSweep,
    *,
    resume: bool,
    console: Console,
    retry_failed: bool = False,
    write_report: ReportWriter | None = None,
    train: Train = train_run,
    compare: Compare = compare_with_baseline,
) -> SweepResult:
    """Search, then say whether rollouts pay.

    Args:
        loaded: the checked sweep.
        resume: go on with a sweep that its folder holds.
        console: where progress is shown.
        retry_failed: begin trials again that failed, except those whose settings can't be trained.
        write_report: writes tables and figures into the sweep's folder, returns name -> path.
        train: trains one run.
        compare: compares candidates with the baseline.

    Returns:
        The result; `exit_code` 0, 1 if the baseline failed, 75 if it was stopped and can go on.

    Raises:
        StorageError: the folder can't be used as asked.
        ConfigError: a resumed sweep was asked something else, trials don't fit the cluster, or
            can't begin with the weights of `init_from`.
    """
    sweep, base = loaded.sweep, loaded.base.config
    check_storage(anchored(base, Path.cwd()))
    folder = sweep_folder(sweep, resume=resume)
    start = shared_base(anchored(base, Path.cwd()), folder)
    with open_sweep_folder(folder, sweep, base), contextlib.ExitStack() as at_end:
        journal = Journal(folder)
        store = open_store(loaded, folder, budget=loaded.budget)
        if store is not None:
            at_end.callback(store.close)
        pin_base(start, folder, write=True)
        plan = TrialPlan(
            raw={**loaded.base.raw, "init_from": start.init_from},
            folder=folder,
            budget=loaded.budget,
            seeds=sweep.seeds,
            store=store.handle if store else None,
            train=train,
        )
        if retry_failed:
            retry(journal)
        interrupted = search(loaded, journal, plan, store, console)
        result = _conclude(loaded, journal, plan, compare, stopped=interrupted)
        if write_report is not None and result.status != "stopped":
            files = {**result.files, **write_report(result, base)}
            result = dataclasses.replace(result, files=files)
        if store is not None:
            store.finish(result)
            files = {**result.files, "mlflow_ui": store.ui_command()}
            result = dataclasses.replace(result, files=files)
        with storage_errors(folder, "writing the sweep's result"):
            write_json(folder / RESULT_FILE, result.as_json())
    return result


def retry(journal: Journal) -> list[int]:
    """Let failed trials begin again; numbers that diverged and memory that ran out are results."""
    numbers = [r.number for r in journal.ordered() if r.status == "failed" and not r.infeasible]
    for number in numbers:
        journal.append("retry", number)
    return numbers


def _conclude(
    loaded: LoadedSweep, journal: Journal, plan: TrialPlan, compare: Compare, *, stopped: bool
) -> SweepResult:
    objectives = sweep_objectives(loaded.sweep.objective, loaded.base.config, plan.budget)
    measure_trials(journal, objectives)
    trials = journal.ordered()
    result = SweepResult(
        plan.folder.name,
        "stopped",
        plan.folder,
        trials,
        budget=plan.budget,
        files=_files(plan),
        fixed_cost=fixed_cost(trials),
    )
    baseline, reason = result.baseline, hopeless(journal, objectives)
    if reason is not None:
        again = baseline is not None and baseline.status == "failed" and not baseline.infeasible
        hint = "; once that is mended: --resume --retry-failed" if again else ""
        return dataclasses.replace(result, status="failed", error=reason + hint)
    # Trials that their node took along are unfinished although nobody asked to stop.
    if any(not trial.ended for trial in trials) or (stopped and remaining_trials(loaded, journal)):
        return result
    if baseline is None or baseline.status != "finished" or baseline.q is None:
        error = "the baseline failed: it did not reach its budget"
        return dataclasses.replace(result, status="failed", error=error)
    candidates = [trial for trial in eligible(trials) if not trial.baseline]
    config = loaded.base.config
    comparisons = compare(baseline, candidates, config=config, seeds=plan.seeds)
    verdict = decide(
        trials,
        comparisons,
        num_seeds=len(plan.seeds),
        metric=metric_name(config),
        rolls_out=lambda record: rolls_out(plan.config(record.as_trial(), plan.seeds[0])),
        objectives=objectives,
    )
    # What can't be told from teacher forcing doesn't beat it, whatever the order of the q values.
    pays = verdict.answer in ("rollouts_pay", "other_method_pays")
    winner = (best(candidates, objectives) if pays else None) or baseline
    files = {**result.files, **_winner_files(plan, winner)}
    return dataclasses.replace(
        result,
        status="finished",
        winner=winner,
        verdict=verdict,
        files=files,
        pareto=pareto_summary(objectives, trials),
    )


def _files(plan: TrialPlan) -> dict[str, str]:
    return {
        "sweep_config": str(plan.folder / "sweep.yaml"),
        "journal": str(plan.folder / "trials.jsonl"),
        "trial_logs": str(plan.folder / "trials" / "TRIAL" / LOG_FILE),
    }


def _winner_files(plan: TrialPlan, winner: TrialRecord) -> dict[str, str]:
    path = plan.folder / "winner.yaml"
    with storage_errors(plan.folder, "writing the winner's config"):
        write_yaml(plan.config(winner.as_trial(), plan.seeds[0]), path)
    return {"winner_config": str(path), "winner_run": winner.run_dir}
