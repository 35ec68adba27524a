"""A report of a made-up sweep: what stands in the files, and that nothing falls off the page."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from raysched.config.run import RunConfig
from raysched.report import print_summary, write_report
from raysched.report.figures import curves_figure, non_dominated, pareto_figure
from raysched.report.sheets import sample_sheet
from raysched.report.table import table_rows
from raysched.tuning.display import trial_table
from raysched.tuning.records import Point, SweepResult, TrialRecord, Verdict, trial_name
from raysched.tuning.verdict import best

K, P = "scheduled_sampling.max_step_offset", "scheduled_sampling.probability"


def make_trial(folder: Path, number: int, q: float, status: str = "finished") -> TrialRecord:
    run_dir = folder / "trials" / trial_name(number, baseline=number == 0)
    run_dir.mkdir(parents=True)
    settings = {K: number, P: 0.123456} if number else {}
    trial = TrialRecord(
        number, baseline=number == 0, assignments=settings, status=status, run_dir=str(run_dir)
    )
    for part in range(1, 5 if status == "finished" else 2):
        trial.add_point(Point(250.0 * part, q * (5 - part)))
    trial.q_low, trial.q_high = trial.q - 0.01, trial.q + 0.01
    if status == "finished":
        trial.q_epsilon_scaled = trial.q - 0.0123
        images = torch.full((20, 1, 8, 8), 10 * (number + 1), dtype=torch.uint8)
        labels = torch.arange(20) % 10
        save_file(
            {"nfe_5": images, "nfe_10": images.clone(), "labels": labels},
            run_dir / "final_samples.safetensors",
        )
    return trial


@pytest.fixture
def result(tmp_path: Path) -> SweepResult:
    trials = [
        make_trial(tmp_path, 0, 0.2),
        make_trial(tmp_path, 1, 0.1),
        make_trial(tmp_path, 2, 0.9, "pruned"),
        make_trial(tmp_path, 3, 0.3),
    ]
    verdict = Verdict("trial 001 beats teacher forcing by 0.1 (indicative)", "rollouts_pay", 0.1)
    return SweepResult(
        "demo", "finished", tmp_path, trials, winner=best(trials), verdict=verdict, budget=1000.0
    )


def test_every_file_is_written_where_the_result_says(result):
    files = write_report(result, RunConfig())
    assert set(files) == {"table_csv", "table_json", "pareto", "curves", "sample_grid"}
    assert all(Path(path).parent == result.folder / "report" for path in files.values())
    for name in ("pareto", "curves", "sample_grid"):
        with Image.open(files[name]) as image:
            assert image.width > 400
            assert len(np.unique(np.asarray(image.convert("L")))) > 5


def test_the_tables_hold_one_row_per_trial_with_numbers_that_read_back(result):
    files = write_report(result, RunConfig())
    with Path(files["table_csv"]).open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["trial"] for row in rows] == ["000-baseline", "001", "002", "003"]
    assert rows[0][K] == ""
    assert (rows[1]["winner"], rows[1][P], float(rows[1]["q"])) == ("True", "0.123456", 0.1)
    assert float(rows[1]["q_epsilon_scaled"]) == pytest.approx(0.0877)
    assert (rows[2]["status"], rows[2]["q_epsilon_scaled"]) == ("stopped early", "")
    stored = json.loads(Path(files["table_json"]).read_text())
    assert stored == json.loads(json.dumps(table_rows(result)))


def test_a_table_of_methods_shows_what_each_uses_under_headers_that_differ():
    gammas = {"input_perturbation.gamma": 0.1, "mixflow.gamma": 0.8}
    records = [
        TrialRecord(n, assignments={"exposure": method, **gammas})
        for n, method in enumerate(("input_perturbation", "mixflow"), start=1)
    ]
    console = Console(file=io.StringIO(), width=200)
    console.print(trial_table(console, records, budget=1.0))
    header, *rows = (line.split() for line in console.file.getvalue().splitlines())
    assert header[1:4] == ["exposure", "input_perturbation.gamma", "mixflow.gamma"]
    assert [row[1:4] for row in rows] == [
        ["input_perturbation", "0.1", "–"],
        ["mixflow", "–", "0.8"],
    ]


def test_the_front_holds_what_no_other_point_beats():
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 5.0), (2.0, 3.0), (3.0, 2.0), (4.0, 1.0)]
    assert non_dominated(points) == [(1.0, 5.0), (2.0, 3.0), (3.0, 1.0)]
    assert non_dominated([]) == []


def test_every_text_of_the_figures_lies_on_the_page_and_nan_is_left_out(result):
    odd = TrialRecord(4, status="failed", q=float("nan"), assignments={K: 4})
    many = TrialRecord(5, status="failed", q=None, assignments={K: 5})
    trials = [*result.trials, odd, many]
    for make in (pareto_figure, curves_figure):
        figure = make(trials, budget=1000.0, label="q: KID", winner=1)
        figure.draw_without_rendering()
        page = figure.bbox
        for axes in figure.axes:
            box = axes.get_tightbbox()
            assert box.x0 >= page.x0 - 1
            assert box.x1 <= page.x1 + 1
            assert box.y0 >= page.y0 - 1
            assert box.y1 <= page.y1 + 1
        (legend,) = figure.legends
        words = " ".join(text.get_text() for text in legend.get_texts())
        assert "baseline" in words
        assert "001 winner" in words
        box = legend.get_window_extent()
        assert box.y0 >= page.y0 - 1
        assert box.y1 <= min(axes.get_tightbbox().y0 for axes in figure.axes) + 1


def test_a_sweep_whose_trials_all_failed_still_has_its_figures():
    failed = [TrialRecord(0, baseline=True, status="failed"), TrialRecord(1, status="failed")]
    for make in (pareto_figure, curves_figure):
        make(failed, budget=1000.0, label="q", winner=None).draw_without_rendering()


def test_the_sheet_shows_the_trials_one_under_the_other_from_the_same_noise(result):
    dark = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    grey = dark + 77
    labels = torch.arange(20) % 10
    baseline, candidate = result.trials[:2]
    sheet = sample_sheet([(baseline, {5: dark}, labels), (candidate, {5: grey}, labels)])
    grey_rows = np.flatnonzero((sheet == 77).all(-1).sum(1) > 300)
    dark_rows = np.flatnonzero((sheet == 0).all(-1).sum(1) > 300)
    assert len(grey_rows) == len(dark_rows) == 2 * 48
    assert dark_rows.max() < grey_rows.min()
    columns = [np.flatnonzero((sheet[rows[0]] < 100).all(-1)) for rows in (dark_rows, grey_rows)]
    assert (columns[0] == columns[1]).all()


def test_missing_samples_leave_the_sheet_out_and_nothing_else(result):
    for path in result.folder.rglob("final_samples.safetensors"):
        path.unlink()
    assert "sample_grid" not in write_report(result, RunConfig())


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_summary_is_whole_at_every_width(result, width):
    console = Console(file=io.StringIO(), width=width)
    print_summary(result, console)
    shown = console.file.getvalue()
    assert "001 *" in shown
    assert "stopped early" in shown
    assert "0.1 [0.09, 0.11]" in shown
    assert "1,000 (100 %)" in shown
    assert "0.0877" in shown
    assert "q scaled: the same weights" in " ".join(shown.split())
    assert f"Verdict: {result.verdict.text}" in shown
    assert "…" not in shown
    # Wide enough, the settings have columns of their own; else a table of their own.
    assert ("max_step_offset=1" in shown) == (width < 100)
