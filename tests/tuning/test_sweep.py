"""Whole sweeps by Ray Tune, with a stand-in for training whose quality is known."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from raysched.config.space import load_sweep
from raysched.errors import ConfigError
from raysched.tuning.journal import Journal, read_events
from raysched.tuning.sweep import run_sweep
from raysched.tuning.verdict import Comparison
from tests.tuning.synthetic import OFFSET, known_comparison, load, synthetic_train

ROOT = Path(__file__).parents[2]


def run(loaded, train, **more):
    console = Console(file=io.StringIO(), width=200)
    result = run_sweep(
        loaded, console=console, train=train, compare=known_comparison, **{"resume": False, **more}
    )
    return result, console.file.getvalue()


@pytest.mark.ray
def test_a_sweep_finds_the_known_best_prunes_the_worse_and_survives_a_failure(
    tmp_path, ray_session, capfd
):
    points = [{OFFSET: k} for k in (2, 8, 3, 1)]
    loaded = load(
        tmp_path, search={"num_samples": 4, "seed": 1, "points": points, "max_concurrent": 1}
    )
    train = synthetic_train(tmp_path / "log", quality="0.1 * K if K else 0.5", fail_at=3)
    result, shown = run(loaded, train)
    statuses = {trial.number: trial.status for trial in result.trials}
    assert statuses == {0: "finished", 1: "finished", 2: "pruned", 3: "failed", 4: "finished"}
    assert result.exit_code == 0
    assert result.baseline.number == 0
    assert result.winner.assignments == {OFFSET: 1}
    assert result.verdict.answer == "rollouts_pay"
    assert result.verdict.difference == pytest.approx(0.4)
    pruned, failed = result.trials[2], result.trials[3]
    assert pruned.forward_equivalents == 250
    assert "rung at 25 %" in pruned.error
    assert "the disk caught fire" in failed.error
    assert "trial 002 stopped early: q 3.8" in shown
    assert "trial 003 failed" in shown
    assert not list(Path(loaded.sweep.output_dir).glob(".ray-*"))
    stored = json.loads((result.folder / "result.json").read_text())
    assert {"sweep", "trials", "baseline", "winner", "verdict", "files"} <= stored.keys()
    assert Path(stored["files"]["winner_config"]).is_file()
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def conclude(tmp_path, gain, half_width):
    """The winner of a sweep that has run already: baseline at 0.5, one candidate."""
    loaded = load(tmp_path, search={"num_samples": 1})
    folder = tmp_path / "sweep"
    folder.mkdir()
    journal = Journal(folder)
    for number, settings, q in ((0, {}, 0.5), (1, {OFFSET: 2}, 0.5 - gain)):
        journal.append("suggested", number, baseline=number == 0, assignments=settings)
        journal.append("ended", number, status="finished", q=q, forward_equivalents=1000.0)
    interval = [Comparison(1, gain, gain - half_width, gain + half_width)]
    console = Console(file=io.StringIO())
    return run_sweep(loaded, resume=True, console=console, compare=lambda *_, **__: interval)


@pytest.mark.parametrize(
    ("gain", "half_width", "winner", "answer"),
    [
        (0.2, 0.1, 1, "rollouts_pay"),
        (0.2, 0.3, 0, "no_clear_winner"),
        (-0.2, 0.3, 0, "no_clear_winner"),
        (-0.2, 0.1, 0, "rollouts_do_not_pay"),
    ],
)
def test_a_candidate_is_the_winner_only_where_the_verdict_says_that_it_beats_the_baseline(
    tmp_path, gain, half_width, winner, answer
):
    result = conclude(tmp_path, gain, half_width)
    assert (result.winner.number, result.verdict.answer) == (winner, answer)
    assert Path(result.files["winner_config"]).is_file()
    assert result.exit_code == 0


FINETUNE = sorted((ROOT / "tune_spaces").glob("*_finetune.yaml"))


@pytest.mark.parametrize("path", FINETUNE, ids=[p.name for p in FINETUNE])
def test_a_base_that_is_not_there_is_told_before_anything_is_made_or_started(path, tmp_path):
    loaded = load_sweep(path, [f"output_dir={tmp_path / 'sweep'}", "tracking.enabled=false"])
    with pytest.raises(ConfigError, match=r"init_from: .*runs/BASE: holds no run"):
        run_sweep(loaded, resume=False, console=Console(file=io.StringIO()))
    assert not (tmp_path / "sweep").exists()


def test_all_trials_begin_with_the_checkpoint_that_the_sweep_has_found(tmp_path, monkeypatch):
    from raysched.tuning import sweep
    from tests.training.runs import SMALL, run_loop, small_config

    base = tmp_path / "base"
    base.mkdir()
    (base / "config.yaml").write_text("{}")
    run_loop(small_config(training__budget__steps=2), base)
    first, newer = (base / "checkpoints" / f"step-{n:08d}" for n in (2, 3))
    overrides = {**SMALL, "init_from": str(base), "training.budget.steps": 9}
    overrides |= {"tracking.enabled": False, "evaluation.enabled": True}
    plans = []
    monkeypatch.setattr(sweep, "search", lambda *given: plans.append(given[2]) or True)
    for resume in (False, True):
        loaded = load(tmp_path, overrides=overrides)
        result, _ = run(loaded, None, resume=resume)
        assert result.status == "stopped"
        if not resume:
            # A run that is still training has more of them by and by.
            newer.symlink_to(first)
    trials = [{"trial_number": n, "baseline": not n, "assignments": {}} for n in (0, 1)]
    begun = {plan.config(trial, 0).init_from for plan in plans for trial in trials}
    assert begun == {str(first)}


@pytest.mark.ray
def test_a_finished_sweep_can_be_extended_and_repeats_nothing(tmp_path, ray_session):
    train = synthetic_train(tmp_path / "log")

    def space(num_samples):
        search = {"num_samples": num_samples, "seed": 1}
        return load(tmp_path, search=search, early_stopping={"kind": "none"})

    first, _ = run(space(2), train)
    assert len(first.trials) == 3
    second, _ = run(space(3), train, resume=True)
    assert [trial.number for trial in second.trials] == [0, 1, 2, 3]
    assert second.trials[:3] == first.trials
    assert len((tmp_path / "log").read_text().splitlines()) == 4
    third, _ = run(space(3), train, resume=True)
    assert third.trials == second.trials
    assert len((tmp_path / "log").read_text().splitlines()) == 4


@pytest.mark.ray
def test_candidates_that_end_before_the_baseline_wait_for_it_to_know_their_gain(
    tmp_path, ray_session
):
    loaded = load(
        tmp_path,
        search={"num_samples": 2, "max_concurrent": 2},
        objective={"name": "gain_over_baseline"},
        early_stopping={"kind": "none"},
    )
    journal = tmp_path / "sweep" / "trials.jsonl"
    trained = synthetic_train(tmp_path / "log", quality="0.1 * K if K else 0.9")

    def train(config, **more):
        deadline = time.monotonic() + 60
        while config.exposure == "none" and '"finished"' not in journal.read_text():
            assert time.monotonic() < deadline, "no candidate ended beside the baseline"
            time.sleep(0.02)
        return trained(config, **more)

    result, _ = run(loaded, train)
    assert (result.status, result.error) == ("finished", None)
    gains = {t.number: t.objectives["gain_over_baseline"] for t in result.trials}
    expected = {t.number: 0.9 - 0.1 * t.assignments.get(OFFSET, 9) for t in result.trials}
    assert gains == pytest.approx(expected)
    ends = [e["number"] for e in read_events(journal) if e["event"] == "ended"]
    assert ends[0] != 0


def wait_until(condition, process, limit_s=90):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "took too long"
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


DRIVER = """
import io, sys
from pathlib import Path
from rich.console import Console
from raysched.signals import STOP
from raysched.tuning.sweep import run_sweep
from raysched.tuning.verdict import Comparison
from tests.tuning.synthetic import known_comparison, load, synthetic_train
STOP.install()
folder = Path(sys.argv[1])
train = synthetic_train(folder / "log", wait_for=folder / "go")
result = run_sweep(
    load(folder), resume="resume" in sys.argv, console=Console(file=io.StringIO()),
    train=train, compare=known_comparison,
)
sys.exit(result.exit_code)
"""


def start_driver(folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def half_way(folder: Path) -> bool:
    """The baseline is done, and a candidate waits before its third evaluation."""
    events = read_events(folder / "sweep" / "trials.jsonl")
    done = any(e["event"] == "ended" and e["number"] == 0 for e in events)
    reports = Counter(e["number"] for e in events if e["event"] == "report")
    return done and any(reports[number] == 2 for number in reports)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_was_ended_in_the_middle_goes_on_and_repeats_no_finished_trial(
    tmp_path, number
):
    process = start_driver(tmp_path)
    wait_until(lambda: half_way(tmp_path), process)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == (75 if number == signal.SIGINT else -number), errors
    before = read_events(tmp_path / "sweep" / "trials.jsonl")
    ended = {e["number"] for e in before if e["event"] == "ended" and e["status"] != "stopped"}
    suggested = {e["number"]: e["assignments"] for e in before if e["event"] == "suggested"}
    assert 0 in ended
    assert set(suggested) - ended
    log_before = (tmp_path / "log").read_text().splitlines()

    (tmp_path / "go").touch()
    resumed = start_driver(tmp_path, "resume")
    out, errors = resumed.communicate(timeout=120)
    assert (resumed.returncode, out, errors) == (0, "", "")
    new = (tmp_path / "log").read_text().splitlines()[len(log_before) :]
    started_again = {int(line[:3]) for line in new}
    assert not started_again & ended
    assert set(suggested) - ended <= started_again
    stored = json.loads((tmp_path / "sweep" / "result.json").read_text())
    assert [trial["number"] for trial in stored["trials"]] == [0, 1, 2, 3, 4]
    for trial in stored["trials"]:
        assert trial["status"] in ("finished", "pruned")
        if trial["number"] in suggested:
            assert trial["assignments"] == suggested[trial["number"]]
