"""What a sweep prints at its end: the trials, the verdict, and where everything is."""

from __future__ import annotations

from rich.console import Console

from raysched.tuning.display import SCALED_HEADER, trial_table
from raysched.tuning.fixed_cost import fixed_cost_text
from raysched.tuning.records import SweepResult

FILE_WORDS = {
    "winner_config": "winner's config",
    "winner_run": "winner's run",
    "pareto": "Pareto picture",
    "curves": "curves",
    "sample_grid": "samples, baseline beside the best",
    "table_csv": "table",
    "trial_logs": "logs of a trial",
    "mlflow_ui": "MLflow",
}


def print_summary(result: SweepResult, console: Console) -> None:
    """Print the table of trials, the verdict and the files.

    Args:
        result: the sweep's end.
        console: where to print.
    """
    winner = result.winner.number if result.winner else None
    console.print(trial_table(console, result.trials, budget=result.budget, winner=winner))
    if winner is not None:
        console.print("* winner", style="dim")
    if any(trial.q_epsilon_scaled is not None for trial in result.trials):
        text = f"{SCALED_HEADER}: the same weights, sampled with Epsilon Scaling; no training"
        console.print(text, style="dim")
    console.print()
    if result.status == "stopped":
        _line(console, f"Stopped; go on with --resume output_dir={result.folder}")
    if result.verdict is not None:
        _line(console, f"Verdict: {result.verdict.text}")
        console.print()
    if result.fixed_cost is not None:
        _line(console, fixed_cost_text(result.fixed_cost))
        console.print()
    width = max(len(word) for word in FILE_WORDS.values())
    for key, word in FILE_WORDS.items():
        if key in result.files:
            _line(console, f"{word:<{width}}  {result.files[key]}")


def _line(console: Console, text: str) -> None:
    # Paths stay in one piece, so that they can be copied and clicked.
    console.print(text, markup=False, highlight=False, soft_wrap=True)
