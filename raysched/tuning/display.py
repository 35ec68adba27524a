"""What a sweep shows while it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from raysched.config.idle import idle_keys
from raysched.config.loading import assign
from raysched.errors import ConfigError
from raysched.tuning.objectives import COMPONENTS
from raysched.tuning.pareto import non_dominated
from raysched.tuning.records import TrialRecord

SCALED_HEADER = "q scaled"
STATUS_WORDS = {
    "waiting": "waiting",
    "running": "running",
    "finished": "finished",
    "pruned": "stopped early",
    "failed": "failed",
    "stopped": "stopped, resumable",
}
STATUS_STYLES = {"finished": "green", "pruned": "yellow", "failed": "red", "running": "cyan"}


class Progress:
    """Shows the trials; a context manager, so that the terminal is always given back.

    Args:
        console: where to show.
        budget: forward equivalents of a trial.
        records: the trials as they are now.
    """

    def __init__(
        self, console: Console, *, budget: float, records: Callable[[], list[TrialRecord]]
    ) -> None:
        self._console = console
        self._budget = budget
        self._records = records
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=lambda: trial_table(
                    self._console, self._records(), budget=self._budget
                ),
                refresh_per_second=2,
                redirect_stdout=False,
                redirect_stderr=False,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(self, event: str, record: TrialRecord) -> None:
        """Show an event: started, report or ended."""
        if self._live is None:
            line = progress_line(event, record, self._budget)
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def progress_line(event: str, record: TrialRecord, budget: float) -> str:
    """One plain line for an event."""
    head = f"trial {record.name}"
    if event == "started":
        settings = settings_text(record)
        return f"{head} started: {settings}"
    quality = quality_text(record)
    share = f"{100 * record.forward_equivalents / budget:.0f} % of the budget"
    if event == "report":
        return f"{head}: {share}, q {quality}"
    line = f"{head} {status_text(record)}: q {quality} at {share}"
    return f"{line} ({record.error})" if record.error else line


def trial_table(
    console: Console,
    records: Sequence[TrialRecord],
    *,
    budget: float,
    winner: int | None = None,
) -> RenderableType:
    """The trials: settings, quality with its interval, compute, status.

    Args:
        console: where it will be shown; too narrow for a column per setting, it gets two tables.
        records: the trials.
        budget: forward equivalents of a trial.
        winner: number of the trial to mark.
    """
    keys = swept_keys(records)
    scaled = any(record.q_epsilon_scaled is not None for record in records)
    table = _table(records, keys, budget, winner, scaled=scaled)
    unbounded = console.options.update(max_width=500)
    if console.measure(table, options=unbounded).maximum <= console.width:
        return table
    settings = Table(box=None, pad_edge=False, header_style="bold")
    settings.add_column("trial", no_wrap=True)
    if scaled:
        settings.add_column(SCALED_HEADER, justify="right", no_wrap=True)
    settings.add_column("settings")
    for record in records:
        quality = [scaled_text(record)] if scaled else []
        settings.add_row(record.name + _mark(record, winner), *quality, settings_text(record))
    return Group(_table(records, [], budget, winner, scaled=False), "", settings)


def _table(
    records: Sequence[TrialRecord],
    keys: Sequence[str],
    budget: float,
    winner: int | None,
    *,
    scaled: bool,
) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("trial", no_wrap=True)
    for header in headers(keys):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("q [interval]", justify="right", no_wrap=True)
    if scaled:
        table.add_column(SCALED_HEADER, justify="right", no_wrap=True)
    names = shown_objectives(records)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    front = front_of(records, names) if len(names) > 1 else None
    if front is not None:
        table.add_column("front", no_wrap=True)
    table.add_column("FE spent", justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for record in records:
        spent = record.forward_equivalents
        share = f"{spent:,.0f} ({100 * spent / budget:.0f} %)" if spent else "–"
        table.add_row(
            record.name + _mark(record, winner),
            *(settings_cell(record, key) for key in keys),
            quality_text(record),
            *([scaled_text(record)] if scaled else []),
            *(objective_text(record, name) for name in names),
            *([] if front is None else ["yes" if record.number in front else ""]),
            share,
            status_text(record),
            style=STATUS_STYLES.get(record.status),
        )
    return table


def shown_objectives(records: Iterable[TrialRecord]) -> list[str]:
    """Names of the objectives that have a column: q has one of its own already."""
    names: dict[str, None] = {}
    for record in records:
        names.update(dict.fromkeys(record.objectives))
    return [] if list(names) == ["quality_at_budget"] else list(names)


def front_of(records: Iterable[TrialRecord], names: Sequence[str]) -> set[int]:
    """Numbers of the trials that no other one beats in all objectives."""
    signs = [-1.0 if COMPONENTS[name].direction == "max" else 1.0 for name in names]
    whole = [
        record
        for record in records
        if all(math.isfinite(record.objectives.get(name, math.nan)) for name in names)
    ]
    rows = [[s * r.objectives[n] for s, n in zip(signs, names, strict=True)] for r in whole]
    return {record.number for record, on in zip(whole, non_dominated(rows), strict=True) if on}


def objective_text(record: TrialRecord, name: str) -> str:
    """An objective's value; the stretched bound in brackets if the target was never reached."""
    value = record.objectives.get(name)
    if value is None:
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 1000 else number_text(value)
    return f"never ({text})" if name in record.censored else text


def _mark(record: TrialRecord, winner: int | None) -> str:
    return " *" if record.number == winner else ""


def swept_keys(records: Iterable[TrialRecord]) -> list[str]:
    """Dotted keys that any trial changes, in order of appearance."""
    keys: dict[str, None] = {}
    for record in records:
        keys.update(dict.fromkeys(record.assignments))
    return list(keys)


def used_settings(record: TrialRecord) -> dict[str, Any]:
    """The trial's settings without those that another of its settings leaves without effect."""
    try:
        idle = idle_keys(assign({}, record.assignments), record.assignments)
    except ConfigError:
        # They fit only together with the base run's settings: show all of them.
        return dict(record.assignments)
    return {key: value for key, value in record.assignments.items() if key not in idle}


def headers(keys: Sequence[str]) -> list[str]:
    """Column headers: the last parts of the dotted keys, whole keys where those would repeat."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return [key if last.count(short) > 1 else short for key, short in zip(keys, last, strict=True)]


def status_text(record: TrialRecord) -> str:
    """How a trial stands, in words."""
    return f"infeasible: {record.infeasible}" if record.infeasible else STATUS_WORDS[record.status]


def settings_cell(record: TrialRecord, key: str) -> str:
    """A setting for a table's cell; a dash where the trial leaves it to the base run."""
    settings = used_settings(record)
    return value_text(settings[key]) if key in settings else "–"


def settings_text(record: TrialRecord) -> str:
    """The settings in short: the last parts of the dotted keys with their values."""
    if record.baseline:
        tuned = ", ".join(
            f"{k.rsplit('.', 1)[-1]}={value_text(v)}" for k, v in record.assignments.items()
        )
        return f"teacher forcing ({tuned})" if tuned else "teacher forcing"
    pairs = used_settings(record).items()
    return ", ".join(f"{key.rsplit('.', 1)[-1]}={value_text(value)}" for key, value in pairs)


def value_text(value: object) -> str:
    """A setting's value: three digits are enough to tell trials apart."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def quality_text(record: TrialRecord) -> str:
    """q with its interval."""
    if record.q is None:
        return "–"
    text = number_text(record.q)
    if record.q_low is None or record.q_high is None or not math.isfinite(record.q):
        return text
    return f"{text} [{number_text(record.q_low)}, {number_text(record.q_high)}]"


def scaled_text(record: TrialRecord) -> str:
    """q of the same weights with Epsilon Scaling."""
    return "–" if record.q_epsilon_scaled is None else number_text(record.q_epsilon_scaled)


def number_text(value: float) -> str:
    """A quality with three significant digits."""
    return f"{value:.3g}"
