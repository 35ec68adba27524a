"""`raysched report`: a sweep on one page that needs no network and no other file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from raysched.report.compared import ComparedRun, differing_keys, gather
from raysched.report.figures import curves_figure, pareto_figure, save_figure
from raysched.report.load import StoredSweep, load_stored_sweep
from raysched.report.pick_part import pick_parts
from raysched.report.sheets import sample_sheet
from raysched.report.sweep_figures import (
    fidelity_figure,
    importance_figure,
    objectives_figure,
    parallel_figure,
    survival_figure,
)
from raysched.report.table import write_csv
from raysched.report.write import REPORT_FOLDER, with_samples
from raysched.training.events import LOG_FILE
from raysched.training.files import storage_errors
from raysched.tuning.compare import final_samples, metric_name, run_folders
from raysched.tuning.display import headers, quality_text, settings_text, status_text
from raysched.tuning.fixed_cost import fixed_cost_text
from raysched.tuning.importance import MIN_TRIALS, importances, left_out
from raysched.tuning.records import TrialRecord

PAGE = "report.html"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.verdict { border-left: 4px solid #0072B2; padding: .6rem 1rem; background: #f2f7fb; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #ddd;
         vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
tr.winner { background: #fdf3ea; } tr.baseline { background: #f2f7fb; }
figure, .wide { margin: 1rem 0; overflow-x: auto; }
img { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: 13px; } code { font-size: 13px; }
"""


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        files: name -> path; `page` is the HTML.
        text: where to look, for a person.
        notes: what could not be shown, one line each.
    """

    files: dict[str, str]
    text: str
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """JSON types."""
        return {"files": self.files, "notes": list(self.notes)}


@dataclass(frozen=True)
class Picture:
    """A figure of the page.

    Attributes:
        name: of its file and anchor.
        title: its heading.
        path: its PNG.
        caption: how to read it.
    """

    name: str
    title: str
    path: Path
    caption: str


def write_page(folder: Path, *, out: Path | None = None) -> Report:
    """Draw a sweep's figures and put them on one page.

    Args:
        folder: the sweep's folder; the sweep may still be running.
        out: folder of the page and the PNGs; default: `report/` in the sweep's.

    Raises:
        UserError: the folder holds no sweep, or none of its trials has been evaluated.
        StorageError: the page can't be written.
    """
    stored = load_stored_sweep(folder)
    out = (out or stored.result.folder / REPORT_FOLDER).absolute()
    notes: list[str] = []
    with storage_errors(out, "writing the report"):
        out.mkdir(parents=True, exist_ok=True)
        pictures = draw_pictures(stored, out, notes)
        table = write_csv(stored.result, out / "trials.csv")
        page = out / PAGE
        page.write_text(render(stored, pictures, notes), encoding="utf-8")
    files = {"page": str(page), "table_csv": str(table)}
    files.update({picture.name: str(picture.path) for picture in pictures})
    return Report(files, f"report: {page}", tuple(notes))


def draw_pictures(stored: StoredSweep, out: Path, notes: list[str]) -> list[Picture]:
    """Write all PNGs; what there is nothing to draw of is noted and left out.

    Args:
        stored: the sweep.
        out: where the PNGs go.
        notes: gets one line per picture that is left out.
    """
    result = stored.result
    label = f"q: {metric_name(stored.base)}"
    winner = result.winner.number if result.winner else None
    runs = gather([result.folder])
    pictures = []

    def add(name: str, title: str, figure: Any, caption: str) -> None:
        path = save_figure(figure, out / f"{name}.png")
        pictures.append(Picture(name, title, path, caption))

    add(
        "pareto",
        "Quality against compute",
        pareto_figure(result.trials, budget=result.budget, label=label, winner=winner),
        "Left: every trial where it ended, with its bootstrap interval; the dashed line is the "
        "front. Right: those that spent the whole budget, the only ones that compare fairly.",
    )
    _add_front(stored, add)
    add(
        "curves",
        "Quality as compute is spent",
        curves_figure(result.trials, budget=result.budget, label=label, winner=winner),
        "One line per trial, one point per evaluation.",
    )
    add(
        "parallel",
        "Settings and quality",
        parallel_figure(runs, _searched(stored, runs), label),
        "Each line is a run; it passes the settings that have an effect in it. Dark is better.",
    )
    _add_importance(stored, notes, add)
    add(
        "survival",
        "Rung survival",
        survival_figure(result.trials, budget=result.budget),
        "Candidates that were evaluated at each share of the budget; the rest was stopped early.",
    )
    add(
        "fidelity",
        "Fidelity against diversity",
        fidelity_figure(runs, winner=result.winner.name if result.winner else None),
        "At each run's last evaluation. A method that buys one with the other moves diagonally.",
    )
    _add_samples(stored, out, notes, pictures)
    return pictures


def _add_front(stored: StoredSweep, add: Any) -> None:
    result, front = stored.result, stored.result.pareto
    if front is not None and front["front"]:
        add(
            "front",
            "The front of the objectives",
            objectives_figure(result.trials, front["front"], front["directions"]),
            f"Filled: trials that no other one beats in everything. Hypervolume "
            f"{front['hypervolume']:.4g}, of the baseline alone "
            f"{front['hypervolume_baseline']:.4g}, from the corner "
            f"{', '.join(f'{k} {v:.3g}' for k, v in front['reference'].items())}.",
        )


def _searched(stored: StoredSweep, runs: Sequence[ComparedRun]) -> list[str]:
    differing = differing_keys(runs)
    return [key for key in (*stored.sweep.space, "exposure") if key in differing]


def _add_importance(stored: StoredSweep, notes: list[str], add: Any) -> None:
    found = importances(stored.result.trials, stored.sweep.space)
    missing = headers(left_out(stored.result.trials, stored.sweep.space))
    some = f"Only some trials have {', '.join(missing)}: left out." if missing else ""
    if not found:
        text = f"takes {MIN_TRIALS} trials whose quality differs, and two settings that all have"
        notes.append(f"parameter importance: {text}. {some}".strip())
        return
    count = sum(bool(trial.curve) for trial in stored.result.trials if not trial.baseline)
    add(
        "importance",
        "Which settings matter",
        importance_figure(found),
        f"Functional ANOVA of a random forest over {count} trials, at the last evaluation that "
        f"all of them share. Wide bars: too few trials to say. {some}".strip(),
    )


def _add_samples(
    stored: StoredSweep, out: Path, notes: list[str], pictures: list[Picture]
) -> None:
    from raysched.evaluation.grids import save_png

    shown = with_samples(stored.result)
    if not shown:
        notes.append("samples: no trial has spent its whole budget yet")
        return
    blocks = [(trial, *final_samples(run_folders(trial)[0])) for trial in shown]
    path = Path(save_png(sample_sheet(blocks), out / "samples.png"))
    caption = "The same noise and classes in every block, so that images stand in line."
    pictures.append(Picture("samples", "Samples", path, caption))


def render(stored: StoredSweep, pictures: Sequence[Picture], notes: Sequence[str]) -> str:
    """The page's HTML, pictures and style inside.

    Args:
        stored: the sweep.
        pictures: written already.
        notes: shown at the end.
    """
    result = stored.result
    title = escape(f"Sweep {result.sweep}")
    verdict = result.verdict.text if result.verdict else "none yet: the sweep has not ended"
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="verdict"><strong>Verdict.</strong> {escape(verdict)}</p>',
        *pick_parts(result.folder),
        f"<p>{escape(_cost(stored))}</p>",
        "<h2>Trials</h2>",
        f'<div class="wide">{_table(stored)}</div>',
    ]
    for picture in pictures:
        data = base64.b64encode(picture.path.read_bytes()).decode("ascii")
        caption = escape(picture.caption)
        parts.append(
            f'<h2 id="{picture.name}">{escape(picture.title)}</h2><figure>'
            f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    parts += [f'<p class="note">{escape(note)}</p>' for note in notes]
    parts.append(
        f'<p class="note">Folder: <code>{escape(str(result.folder))}</code>. One forward '
        "equivalent (FE) is a forward pass of one sample; a trained sample costs 3. Lower q is "
        "better.</p>"
    )
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    body = "".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _cost(stored: StoredSweep) -> str:
    result = stored.result
    seeds = len(stored.sweep.seeds)
    # Further seeds are trained only of trials that were not stopped early.
    spent = sum(t.forward_equivalents * (1 + len(t.further_curves)) for t in result.trials)
    full = result.budget * len(result.trials) * seeds
    hours = sum(trial.seconds for trial in result.trials) / 3600
    saved = f", {1 - spent / full:.0%} less than without early stopping" if full > spent else ""
    count = sum(not trial.baseline for trial in result.trials)
    cost = result.fixed_cost
    fixed = f" {fixed_cost_text(cost).capitalize()}." if cost else ""
    return (
        f"{count} candidates and the baseline, {seeds} seed{'s' if seeds > 1 else ''} each, "
        f"budget {result.budget:,.0f} FE. Spent: {spent:,.0f} FE{saved}; {hours:.2f} hours of "
        f"training.{fixed}"
    )


def _table(stored: StoredSweep) -> str:
    result = stored.result
    rows = []
    for trial in sorted(result.trials, key=_rank):
        kind = "winner" if trial is result.winner else ""
        kind = "baseline" if trial.baseline else kind
        share = trial.forward_equivalents / result.budget if result.budget else 0.0
        cells = [
            f"<td>{escape(trial.name)}</td>",
            f'<td class="n">{escape(quality_text(trial))}</td>',
            f'<td class="n">{trial.forward_equivalents:,.0f} ({share:.0%})</td>',
            f'<td class="n">{trial.seconds:,.0f}</td>',
            f"<td>{escape(status_text(trial))}</td>",
            f"<td>{escape(settings_text(trial))}</td>",
            f"<td>{escape(trial.error or '')}</td>",
            f"<td><code>trials/{escape(trial.name)}/{LOG_FILE}</code></td>",
        ]
        rows.append(f'<tr class="{kind}">{"".join(cells)}</tr>')
    head = (
        '<tr><th>trial</th><th class="n">q [interval]</th><th class="n">FE</th>'
        '<th class="n">seconds</th><th>status</th><th>settings</th><th>reason</th>'
        "<th>log</th></tr>"
    )
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _rank(trial: TrialRecord) -> tuple[bool, bool, float]:
    q = trial.q if trial.q is not None and trial.q == trial.q else float("inf")
    return (trial.status == "failed", trial.status != "finished", q)
