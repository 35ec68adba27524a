"""The forecast of a sweep for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from raysched.tuning.sweep_plan import Range, SweepPlan


def print_sweep_plan(plan: SweepPlan, console: Console) -> None:
    """A table, the corners, and the notes."""
    table = Table(show_header=False)
    for name, value in _rows(plan):
        table.add_row(name, value)
    console.print(table)
    corners = Table(box=None, pad_edge=False, header_style="bold")
    corners.add_column("s per 1,000 FE", justify="right")
    corners.add_column("measured at")
    for name, seconds in plan.measured.items():
        corners.add_row(f"{seconds:.3g}", name)
    console.print(corners)
    console.print()
    for note in plan.notes:
        console.print(note, highlight=False, markup=False)


def _rows(plan: SweepPlan) -> Iterator[tuple[str, str]]:
    seeds = f", {plan.num_seeds} seeds each" if plan.num_seeds > 1 else ""
    many = plan.num_baselines > 1
    forced = f"{plan.num_baselines} teacher-forced ones" if many else "the baseline"
    yield "trials", f"{plan.num_trials} and {forced}{seeds}; {plan.concurrent} at once"
    yield "forward equivalents", _range(plan.forward_equivalents, "{:,.0f}")
    yield "  of a whole training", f"{plan.budget_forward_equivalents:,.0f}"
    yield "hours", _range(plan.hours, "{:.3g}")
    yield "  a whole training, s", _range(plan.trial_seconds, "{:.3g}")
    if plan.money is not None:
        yield "money", _range(plan.money, "{:.3g}")
    yield "memory at once", f"{plan.peak_memory_bytes / 2**20:,.0f} MiB"
    yield "disk, at most", f"{plan.disk_bytes / 2**20:,.1f} MiB"
    share = plan.early_stopping_share
    saved = Range(1 - share.high, 1 - share.expected, 1 - share.low)
    yield "early stopping saves", f"{_range(saved, '{:.0%}')} of the candidates' compute"
    yield "candidates at the budget", f"about {plan.expected_survivors:.0f}"
    yield (
        "infeasible corners",
        f"{plan.infeasible_share:.0%}: {plan.num_refused} of {plan.num_corners} refused, "
        f"{plan.num_infeasible} of {plan.num_measured} measured ones failed",
    )


def _range(value: Range, form: str) -> str:
    low, expected, high = (form.format(v) for v in (value.low, value.expected, value.high))
    return expected if low == high else f"{expected} ({low} to {high})"
