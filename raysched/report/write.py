"""All of a sweep's report, in `<sweep_dir>/report/`."""

from __future__ import annotations

from raysched.config.run import RunConfig
from raysched.report.figures import curves_figure, pareto_figure, save_figure
from raysched.report.sheets import sample_sheet
from raysched.report.table import write_csv, write_json_table
from raysched.training.files import storage_errors
from raysched.tuning.compare import final_samples, metric_name, run_folders
from raysched.tuning.records import SweepResult, TrialRecord
from raysched.tuning.verdict import best

REPORT_FOLDER = "report"


def write_report(result: SweepResult, config: RunConfig) -> dict[str, str]:
    """Write tables, figures and sample sheets.

    Args:
        result: the sweep's end.
        config: its base run.

    Returns:
        Name -> path: table_csv, table_json, pareto, curves, sample_grid (the baseline and the best
        candidate from the same noise).

    Raises:
        StorageError: the folder can't be written.
    """
    from raysched.evaluation.grids import save_png

    folder = result.folder / REPORT_FOLDER
    label = f"q: {metric_name(config)}"
    winner = result.winner.number if result.winner else None
    files = {}
    with storage_errors(folder, "writing the report"):
        folder.mkdir(exist_ok=True)
        files["table_csv"] = write_csv(result, folder / "trials.csv")
        files["table_json"] = write_json_table(result, folder / "trials.json")
        pareto = pareto_figure(result.trials, budget=result.budget, label=label, winner=winner)
        files["pareto"] = save_figure(pareto, folder / "pareto.png")
        curves = curves_figure(result.trials, budget=result.budget, label=label, winner=winner)
        files["curves"] = save_figure(curves, folder / "curves.png")
        shown = with_samples(result)
        if shown:
            blocks = [(trial, *final_samples(run_folders(trial)[0])) for trial in shown]
            sheet = sample_sheet(blocks)
            files["sample_grid"] = save_png(sheet, folder / "samples.png")
    return {name: str(path) for name, path in files.items()}


def with_samples(result: SweepResult) -> list[TrialRecord]:
    """The baseline and the best candidate that reached the budget, where they have samples."""
    others = [trial for trial in result.trials if not trial.baseline]
    number = result.verdict.candidate if result.verdict else None
    candidate = next((t for t in others if t.number == number), None) or best(others)
    trials = [trial for trial in (result.baseline, candidate) if trial is not None]
    return [t for t in trials if (run_folders(t)[0] / "final_samples.safetensors").is_file()]
