"""`raysched pick`: train the best few and the baseline again on fresh seeds, and decide.

It is a small sweep of its own in `<sweep>/pick/`, whose trials are given: the same processes,
journal and tracking, so that a pick that was killed goes on with `--resume`. More seeds or
candidates can be asked for on resume; what has been trained is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from raysched.config.loading import write_yaml
from raysched.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUMABLE, StorageError
from raysched.training.files import storage_errors, write_json
from raysched.training.result import finite_json, read_result
from raysched.tuning.compare import compare_with_baseline, metric_name, run_folders
from raysched.tuning.folder import SWEEP_FILE, holds_sweep, open_sweep_folder
from raysched.tuning.journal import Journal
from raysched.tuning.pick_decision import Candidate, Decision, decide_pick
from raysched.tuning.pick_plan import PICK_FOLDER, PickPlan, plan_pick
from raysched.tuning.records import SweepResult, SweepStatus, TrialRecord, Verdict, trial_name
from raysched.tuning.search import search
from raysched.tuning.store import open_store
from raysched.tuning.sweep import Compare
from raysched.tuning.trial import Train, TrialPlan, train_run

# The trials that finished, baseline first, and the folder -> name and path of what was drawn.
SheetWriter = Callable[[Sequence[TrialRecord], Path], dict[str, str]]


@dataclasses.dataclass(frozen=True)
class PickResult:
    """The end of a pick.

    Attributes:
        status: finished, stopped (resumable) or failed (the baseline failed).
        folder: `<sweep>/pick`.
        trials: the baseline and the candidates as they were trained again.
        seeds: the fresh seeds.
        decision: the answer; None before all is trained.
        winner: who beats the baseline; else the baseline itself.
        files: what was written, name -> path.
        error: why it failed.
    """

    status: SweepStatus
    folder: Path
    trials: list[TrialRecord]
    seeds: tuple[int, ...]
    decision: Decision | None = None
    winner: TrialRecord | None = None
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    error: str | None = None

    @property
    def verdict(self) -> Verdict | None:
        """The answer in words and numbers."""
        return self.decision.verdict if self.decision else None

    @property
    def exit_code(self) -> int:
        """The process exit code that goes with the status."""
        codes = {"finished": EXIT_OK, "stopped": EXIT_RESUMABLE, "failed": EXIT_FAILED}
        return codes[self.status]

    def as_json(self) -> dict[str, Any]:
        """The result as JSON types."""
        decision, winner = self.decision, self.winner
        content: dict[str, Any] = finite_json(
            {
                "status": self.status,
                "output_dir": str(self.folder),
                "seeds": list(self.seeds),
                "trials": [trial.as_json() for trial in self.trials],
                "winner": winner.as_json() if winner else None,
                "verdict": dataclasses.asdict(decision.verdict) if decision else None,
                "p_values": decision.p_values if decision else None,
                "reasons": list(decision.reasons) if decision else [],
                "files": self.files,
                "error": self.error,
            }
        )
        return content

    def as_text(self) -> str:
        """The last lines for a person."""
        if self.verdict is None:
            asked = f"--seeds {len(self.seeds)} --top {len(self.trials) - 1}"
            again = f"raysched pick {self.folder.parent} --resume {asked}"
            stopped = f"stopped; go on with: {again}"
            return stopped if self.status == "stopped" else ""
        assert self.decision is not None
        lines = [f"Verdict: {self.verdict.text}", *(f"- {r}" for r in self.decision.reasons)]
        return "\n".join([*lines, *(f"{name}: {path}" for name, path in self.files.items())])


def run_pick(
    sweep_folder: Path,
    *,
    top: int | None,
    num_seeds: int | None,
    resume: bool,
    console: Console,
    write_sheet: SheetWriter | None = None,
    train: Train = train_run,
    compare: Compare = compare_with_baseline,
) -> PickResult:
    """Train the best few again, and say who beats the baseline.

    Args:
        sweep_folder: of a sweep that has trained candidates to the budget.
        top: candidates beside the baseline; None: as many as the pick in the folder has, or 3.
        num_seeds: fresh seeds of each; None likewise.
        resume: go on with the pick in the folder, or add seeds or candidates to it.
        console: where progress is shown.
        write_sheet: draws samples of the trials.
        train: trains one run.
        compare: compares candidates with the baseline.

    Raises:
        StorageError: the folder holds no sweep, or a pick already.
    """
    pick = plan_pick(sweep_folder.resolve(), top=top, num_seeds=num_seeds)
    folder, loaded = pick.folder / PICK_FOLDER, pick.loaded
    if holds_sweep(folder) and not resume:
        raise StorageError(
            f"{folder} already holds a pick: go on with it, or add --seeds or --top to it, by "
            "--resume"
        )
    with _opened(folder, pick), contextlib.ExitStack() as at_end:
        journal = Journal(folder)
        store = open_store(loaded, folder, budget=loaded.budget)
        if store is not None:
            at_end.callback(store.close)
        plan = TrialPlan(
            raw=loaded.base.raw,
            folder=folder,
            budget=loaded.budget,
            seeds=loaded.sweep.seeds,
            store=store.handle if store else None,
            train=train,
            written=pick.configs,
        )
        _enter(journal, pick, plan, open_run=store.open_run if store else None)
        stopped = search(loaded, journal, plan, store, console)
        numbers = {record.number for record in pick.chosen}
        trials = [record for record in journal.ordered() if record.number in numbers]
        result = PickResult("stopped", folder, trials, plan.seeds)
        if all(record.ended for record in trials) or not stopped or _baseline_failed(trials):
            result = _conclude(result, pick, plan, compare)
        if result.status == "finished" and write_sheet is not None:
            shown = [t for t in trials if t.status == "finished"]
            files = {**result.files, **write_sheet(shown, folder)}
            result = dataclasses.replace(result, files=files)
        if store is not None:
            store.finish(_as_sweep(result, loaded.budget))
        with storage_errors(folder, "writing the pick's result"):
            write_json(folder / "result.json", result.as_json())
    return result


@contextlib.contextmanager
def _opened(folder: Path, pick: PickPlan) -> Iterator[None]:
    """Own the folder; its settings follow from the sweep's folder, so they need no check."""
    with storage_errors(folder, "making the pick's folder"):
        folder.mkdir(exist_ok=True)
        (folder / SWEEP_FILE).unlink(missing_ok=True)
    with open_sweep_folder(folder, pick.loaded.sweep, pick.loaded.base.config):
        yield


def _enter(
    journal: Journal,
    pick: PickPlan,
    plan: TrialPlan,
    *,
    open_run: Callable[..., str] | None,
) -> None:
    """Journal what is to be trained; a trial that lacks a seed, or failed, is entered again."""
    for record in pick.chosen:
        known = journal.records.get(record.number)
        if known is not None and known.ended and (known.diverged or _complete(plan, known)):
            continue
        if known is not None and not known.ended:
            continue
        record.run_dir = str(
            plan.folder / "trials" / trial_name(record.number, baseline=record.baseline)
        )
        journal.append(
            "suggested",
            record.number,
            baseline=record.baseline,
            assignments=record.assignments,
            run_dir=record.run_dir,
            tracking_id=open_run(record, plan=plan) if open_run else "",
        )


def _complete(plan: TrialPlan, record: TrialRecord) -> bool:
    if len(record.further_curves) + 1 != len(plan.seeds):
        # Of more seeds than are asked for now: their mean is made anew, without training.
        return False
    results = [read_result(folder) for folder in plan.run_dirs(record.as_trial())]
    return all(result is not None and result.status == "finished" for result in results)


def _baseline_failed(trials: Sequence[TrialRecord]) -> bool:
    return any(trial.baseline and trial.status == "failed" for trial in trials)


def _conclude(result: PickResult, pick: PickPlan, plan: TrialPlan, compare: Compare) -> PickResult:
    baseline = next(trial for trial in result.trials if trial.baseline)
    if baseline.status != "finished" or baseline.q is None or not math.isfinite(baseline.q):
        reason = baseline.error or "its quality is not a number"
        return dataclasses.replace(result, status="failed", error=f"the baseline failed: {reason}")
    records = [t for t in result.trials if not t.baseline and t.status == "finished"]
    if not records:
        reason = next((t.error for t in result.trials if t.error), "no quality was measured")
        error = f"no candidate could be trained again: {reason}"
        return dataclasses.replace(result, status="failed", error=error)
    config, num_seeds = pick.loaded.base.config, len(plan.seeds)
    comparisons = compare(baseline, records, config=config, seeds=plan.seeds)
    compared = {c.number: c for c in comparisons}
    candidates = [Candidate(r, pick.rolls_out(r), compared[r.number]) for r in records]
    decision = decide_pick(candidates, num_seeds=num_seeds, metric=metric_name(config))
    lost = tuple(
        f"trial {t.name} was left out, because it failed: {t.error}"
        for t in result.trials
        if t.status == "failed"
    )
    decision = dataclasses.replace(decision, reasons=(*decision.reasons, *lost))
    winner = next((r for r in records if r.number == decision.winner), baseline)
    files = _write_winner(plan, winner, decision)
    return dataclasses.replace(
        result, status="finished", decision=decision, winner=winner, files=files
    )


def _write_winner(plan: TrialPlan, winner: TrialRecord, decision: Decision) -> dict[str, str]:
    """The winner's config, the weights of its best seed, and the reasons."""
    folders = run_folders(winner, plan.seeds)
    folder, seed, run_dir = plan.folder, plan.seeds[0], folders[0]
    best = math.inf
    for own_seed, own_dir in zip(plan.seeds, folders, strict=True):
        found = read_result(own_dir)
        q = found.metrics.get("quality/q", math.inf) if found else math.inf
        if q < best:
            best, seed, run_dir = q, own_seed, own_dir
    files = {"winner_config": folder / "winner.yaml", "reasons": folder / "reasons.txt"}
    lines = [decision.verdict.text, "", *(f"- {reason}" for reason in decision.reasons)]
    lines.append(f"- weights and config are those of trial {winner.name} with seed {seed}")
    with storage_errors(folder, "writing the winner"):
        write_yaml(plan.config(winner.as_trial(), seed), files["winner_config"])
        files["reasons"].write_text("\n".join(lines) + "\n", encoding="utf-8")
        weights, target = run_dir / "pipeline", folder / "pipeline"
        if weights.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(weights, target)
            files["winner_weights"] = target
    return {name: str(path) for name, path in files.items()}


def _as_sweep(result: PickResult, budget: float) -> SweepResult:
    """What the tracking store records: it knows sweeps."""
    return SweepResult(
        f"{result.folder.parent.name}-{PICK_FOLDER}",
        result.status,
        result.folder,
        result.trials,
        winner=result.winner,
        verdict=result.verdict,
        files=result.files,
        error=result.error,
        budget=budget,
    )
