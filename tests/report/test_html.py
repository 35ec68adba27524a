"""The report page: whole, without a network, and honest about what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from raysched.config.loading import load, write_yaml
from raysched.errors import UserError
from raysched.report.html import write_page
from raysched.training.run_folder import MetricsLog
from raysched.tuning.journal import JOURNAL_FILE, Journal
from tests.tuning.synthetic import OFFSET

SWEEP = """
name: toy
space:
  scheduled_sampling.max_step_offset: {randint: [1, 9]}
  scheduled_sampling.probability: {uniform: [0.1, 1.0]}
budget_forward_equivalents: 1000
"""


def make_sweep(folder: Path, num_trials: int, **verdict: Any) -> Path:
    """A finished sweep in which q follows the offset alone."""
    folder.mkdir()
    (folder / "sweep.yaml").write_text(SWEEP)
    write_yaml(load(None).config, folder / "base.yaml")
    journal = Journal(folder)
    for number in range(num_trials + 1):
        name = f"{number:03d}" if number else "000-baseline"
        run_dir = folder / "trials" / name
        run_dir.mkdir(parents=True)
        # Quality follows the offset; the probability goes its own way.
        settings = {OFFSET: 1 + number % 8, "scheduled_sampling.probability": 0.1 + number % 3 / 4}
        assignments = settings if number else {}
        journal.append(
            "suggested", number, baseline=not number, assignments=assignments, run_dir=str(run_dir)
        )
        overrides = [f"{key}={value}" for key, value in assignments.items()]
        write_yaml(load(None, overrides).config, run_dir / "config.yaml")
        log = MetricsLog(run_dir, last_step=0)
        q = 0.1 * settings[OFFSET]
        for part in (1, 2):
            metrics = {"quality/q": q / part, "quality/precision": 0.5, "quality/recall": q}
            log.append(metrics, step=part, forward_equivalents=500 * part, seconds=part)
            journal.append("report", number, q=q / part, forward_equivalents=500 * part)
        journal.append("ended", number, status="finished", q=q / 2, forward_equivalents=1000)
    result = {"status": "finished", "winner": {"number": 1}, "verdict": verdict or None}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    text = "rollouts pay: <b>twice</b> & more"
    folder = make_sweep(tmp_path / "toy", 9, text=text, answer="rollouts_pay")
    report = write_page(folder)
    page = Path(report.files["page"]).read_text(encoding="utf-8")
    assert "rollouts pay: &lt;b&gt;twice&lt;/b&gt; &amp; more" in page
    # Nothing is loaded from elsewhere: no links, no scripts, pictures as data.
    assert not re.search(r"(src|href)=.(?!data:image/png;base64,)", page)
    assert "<script" not in page
    for title in ("Which settings matter", "Rung survival", "Fidelity against diversity"):
        assert f"{title}</h2>" in page
    for number in range(1, 10):
        assert f"<td>{number:03d}</td>" in page
    pictures = [path for path in report.files.values() if path.endswith(".png")]
    assert len(pictures) >= 6
    assert all(Path(path).stat().st_size > 5000 for path in pictures)
    assert report.notes == ("samples: no trial has spent its whole budget yet",)


def test_too_few_trials_have_no_importance_and_the_page_says_so(tmp_path: Path) -> None:
    report = write_page(make_sweep(tmp_path / "toy", 3), out=tmp_path / "out")
    assert "importance" not in report.files
    assert any("takes 6 trials" in note for note in report.notes)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "takes 6 trials" in page
    assert "none yet" in page


def test_settings_that_only_some_trials_have_are_named_on_the_page(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "toy", 9)
    journal = folder / JOURNAL_FILE
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    for event in events:
        if event["event"] == "suggested" and event["number"] % 2:
            del event["assignments"]["scheduled_sampling.probability"]
    journal.write_text("".join(json.dumps(event) + "\n" for event in events))
    report = write_page(folder)
    assert "importance" not in report.files
    (note,) = [note for note in report.notes if "importance" in note]
    assert "two settings that all have. Only some trials have probability: left out." in note


def test_a_folder_without_a_sweep_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no sweep"):
        write_page(tmp_path)
