"""Evaluations beside the training and by several ranks: the numbers of the inline ones."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from raysched.training import evaluations as evaluations_module
from raysched.training.evaluation_process import ProcessEvaluator
from raysched.training.loop import Loop, train_loop
from raysched.training.protocols import EvaluationEnd, NullTracker
from raysched.training.run_folder import holds_run, open_run_folder, read_metrics
from raysched.training.setup import build_run
from raysched.training.snapshots import evaluate_snapshot, last_sign, write_snapshot
from raysched.training.stop import clear_stop
from tests.training.ranks import LEAVE
from tests.training.runs import rollout_config, run_loop
from tests.training.test_resume import StopAt, same_end

SETTINGS = {"evaluation__enabled": True, "training__log_every_steps": 1}


class LateEvaluator:
    """Evaluates here, but only when it has been asked so many times; None: never."""

    def __init__(self, polls: int | None, error: str | None = None) -> None:
        self.polls, self.error, self.started = polls, error, []

    def start(self, folder: Path) -> None:
        self.started.append(folder.name)
        (folder / "started").touch()
        self.left, self.folder = self.polls, folder

    def poll(self, timeout_s: float) -> EvaluationEnd | None:
        if self.left is None:
            return None
        self.left -= 1
        if self.left > 0:
            return None
        if self.error is None:
            evaluate_snapshot(self.folder)
        return EvaluationEnd(self.error)

    def close(self) -> None:
        self.left = None


def train(run_dir: Path, evaluator, *, tracker=None, reports=None, **changes):
    config = rollout_config(**{**SETTINGS, "evaluation__placement": "background", **changes})
    open_run_folder(config, run_dir, resume=holds_run(run_dir))
    clear_stop(run_dir)
    return train_loop(
        config,
        run_dir=run_dir,
        report=(lambda metrics: None) if reports is None else reports.append,
        tracker=tracker or NullTracker(),
        evaluator=evaluator,
    )


def evaluations(run_dir: Path) -> list[tuple[int, float, dict]]:
    return [
        (point["step"], point["forward_equivalents"], point["metrics"])
        for point in read_metrics(run_dir)
        if "quality/q" in point["metrics"]
    ]


@pytest.fixture
def inline(tmp_path):
    result = run_loop(rollout_config(**SETTINGS), tmp_path / "inline")
    return result, evaluations(tmp_path / "inline")


@pytest.mark.parametrize("polls", [3, 5])
def test_results_from_beside_are_those_of_inline_at_their_own_step(
    tmp_path, inline, polls, monkeypatch
):
    monkeypatch.setattr("raysched.training.evaluations.POLL_S", 0.0)
    reports: list[dict] = []
    result = train(tmp_path / "run", LateEvaluator(polls), reports=reports)
    same_end(result, inline[0])
    assert evaluations(tmp_path / "run") == inline[1]
    assert [r["step"] for r in reports] == [step for step, _, _ in inline[1]] == [3, 6, 9, 12]
    assert [r["quality/q"] for r in reports] == [m["quality/q"] for _, _, m in inline[1]]
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    late = [n for n, p in enumerate(lines) if "quality/q" in p["metrics"] and p["step"] == 3]
    assert lines[late[0] - 1]["step"] > 3, "the evaluation was not beside the training"
    assert not (tmp_path / "run" / "evaluations").exists()


def test_an_evaluation_that_fails_beside_is_made_by_the_worker_with_a_warning(
    tmp_path, inline, caplog
):
    result = train(tmp_path / "run", LateEvaluator(1, error="out of memory"))
    same_end(result, inline[0])
    assert evaluations(tmp_path / "run") == inline[1]
    assert caplog.text.count("failed (out of memory); the worker makes it now") == 3


@pytest.mark.parametrize("polls", [None, 2])
def test_a_stop_with_pending_evaluations_loses_none(tmp_path, inline, polls, monkeypatch, caplog):
    monkeypatch.setattr("raysched.training.stop.POLL_S", 0.0)
    monkeypatch.setattr("raysched.training.evaluations.POLL_S", 0.0)
    run_dir = tmp_path / "run"
    stopped = train(run_dir, LateEvaluator(polls), tracker=StopAt(run_dir, 7))
    assert stopped.status == "stopped"
    if polls is None:
        assert "evaluations of step 3, 6 are still to be made" in caplog.text
    again = LateEvaluator(2)
    same_end(train(run_dir, again), inline[0])
    assert evaluations(run_dir) == inline[1]
    assert ("step-00000003" in again.started) == (polls is None)


def test_a_lost_snapshot_is_told(tmp_path, monkeypatch, caplog):
    import shutil

    monkeypatch.setattr("raysched.training.stop.POLL_S", 0.0)
    run_dir = tmp_path / "run"
    train(run_dir, LateEvaluator(None), tracker=StopAt(run_dir, 4))
    shutil.rmtree(run_dir / "evaluations")
    result = train(run_dir, LateEvaluator(1))
    assert result.status == "finished"
    assert "step 3: its evaluation is lost" in caplog.text
    assert [step for step, _, _ in evaluations(run_dir)] == [6, 9, 12]


@pytest.mark.slow
def test_a_killed_evaluation_process_costs_nothing(tmp_path, inline, caplog, monkeypatch):
    evaluator, killed = ProcessEvaluator(1), []
    start = evaluator.start

    def start_and_kill_once(folder):
        start(folder)
        if not killed:
            killed.append(folder.name)
            os.kill(evaluator._process.pid, signal.SIGKILL)

    monkeypatch.setattr(evaluator, "start", start_and_kill_once)
    # Patient to the end, so that the process answers at least once.
    monkeypatch.setattr("raysched.training.evaluations.has_started", lambda folder: True)
    same_end(train(tmp_path / "run", evaluator), inline[0])
    assert evaluations(tmp_path / "run") == inline[1]
    assert killed == ["step-00000003"]
    assert caplog.text.count("failed (its process ended with code -9") == 1
    assert evaluator._process is None


@pytest.mark.slow
def test_an_evaluation_that_hangs_is_ended_and_made_by_the_worker(
    tmp_path, inline, caplog, monkeypatch
):
    evaluator, stopped = ProcessEvaluator(1), []
    start = evaluator.start

    def start_and_stop_once(folder):
        start(folder)
        if not stopped:
            stopped.append(evaluator._process.pid)
            (folder / "started").touch()  # as if it had begun: no later than that it is stopped
            os.kill(evaluator._process.pid, signal.SIGSTOP)

    monkeypatch.setattr(evaluator, "start", start_and_stop_once)
    result = train(tmp_path / "run", evaluator, scaling__hang_timeout_s=2.0)
    same_end(result, inline[0])
    assert evaluations(tmp_path / "run") == inline[1]
    assert caplog.text.count("has not got on for 2 s (scaling.hang_timeout_s)") == 1
    assert evaluator._process is None
    with pytest.raises(ProcessLookupError):
        os.kill(stopped[0], 0)


def test_an_evaluation_that_gets_on_is_waited_for_however_long_it_takes(
    tmp_path, inline, monkeypatch, caplog
):
    clock = [0.0]

    class Slow(LateEvaluator):
        """Shows a sign in every look, each of which takes two thirds of the limit."""

        def poll(self, timeout_s):
            clock[0] += 0.7
            os.utime(self.folder / "started", ns=(self.left, self.left))
            return super().poll(timeout_s)

    monkeypatch.setattr("raysched.training.evaluations.time.monotonic", lambda: clock[0])
    result = train(tmp_path / "run", Slow(20), scaling__hang_timeout_s=1.0)
    same_end(result, inline[0])
    assert evaluations(tmp_path / "run") == inline[1]
    assert "has not got on" not in caplog.text


def test_an_evaluation_shows_that_it_gets_on(tmp_path, monkeypatch):
    monkeypatch.setattr("raysched.training.snapshots.SIGN_S", 0.0)
    run = build_run(rollout_config(**SETTINGS))
    folder = write_snapshot(tmp_path, run.config, 3, run.policy.state_dict(), "cpu")
    touched, touch = [], Path.touch
    monkeypatch.setattr(
        Path, "touch", lambda path, *a, **k: (touched.append(path.name), touch(path, *a, **k))
    )
    assert last_sign(folder) is None
    evaluate_snapshot(folder)
    # 2 steps for the samples, 8 for those that they are compared with, and the beginning.
    assert touched.count("started") == 1 + 2 + 8
    assert last_sign(folder) is not None


def test_a_worker_that_makes_an_evaluation_shows_that_it_gets_on(tmp_path, monkeypatch):
    words, whole = [], evaluations_module.evaluate_snapshot

    def watched(folder, on_forward):
        def show():
            on_forward()
            words.append(loop.work()[1])

        whole(folder, show)

    monkeypatch.setattr("raysched.training.evaluations.evaluate_snapshot", watched)
    config = rollout_config(**{**SETTINGS, "evaluation__placement": "background"})
    open_run_folder(config, tmp_path / "run", resume=False)
    loop = Loop(
        build_run(config),
        tmp_path / "run",
        lambda m: None,
        NullTracker(),
        LateEvaluator(1, "gone"),
    )
    loop.restore()
    assert loop.until_end() == "finished"
    loop.feed.close()
    # Three evaluations of 2 + 8 calls; the last is made by the run itself.
    assert len(words) == len(set(words)) == 30


RANKS = """
import json, sys
from pathlib import Path
from tests.training.runs import run_loop, rollout_config
import torch
torch.set_num_threads(1)
result = run_loop(rollout_config(**json.loads(sys.argv[1])), Path(sys.argv[2]))
print(json.dumps({"metrics": result.metrics, "compute": result.compute}))
"""
SAME_WEIGHTS = """
import json, sys, os, torch
from pathlib import Path
torch.set_num_threads(1)
from tests.training.runs import rollout_config
from raysched.training.evaluate_step import evaluate_run
from raysched.training.protocols import NullTracker
from raysched.training.setup import build_run
run = build_run(rollout_config(**json.loads(sys.argv[1])))
found = evaluate_run(run, Path(sys.argv[2]), NullTracker(), final=True)
print(json.dumps({"metrics": found, "spent": run.meter.evaluation}))
"""
ROOT = Path(__file__).resolve().parents[2]
FEW = {"evaluation__batch_size": 6, "evaluation__nfe": [2, 3], "evaluation__enabled": True}


def start(script: str, run_dir: Path, changes: dict, **place: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", script + LEAVE, json.dumps({**FEW, **changes}), str(run_dir)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **place},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen) -> dict:
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(text.splitlines()[-1])


def on_two_ranks(script: str, run_dir: Path, changes: dict) -> list[dict]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [start(script, run_dir, changes, **place, RANK=r, LOCAL_RANK=r) for r in ("0", "1")]
    return [answer(rank) for rank in ranks]


@pytest.mark.slow
def test_two_ranks_evaluate_bit_for_bit_what_one_does(tmp_path):
    alone = answer(start(SAME_WEIGHTS, tmp_path / "one", {}))
    first, second = on_two_ranks(SAME_WEIGHTS, tmp_path / "two", {})
    assert first == second == alone
    assert alone["spent"] == 2 * 20 * (2 + 3) + 20 * 8
    images = [(tmp_path / n / "final_samples.safetensors").read_bytes() for n in ("one", "two")]
    assert images[0] == images[1]


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["ranks", "inline"])
def test_a_run_of_two_ranks_counts_its_evaluations_and_the_ranks_spread(tmp_path, placement):
    changes = {"evaluation__placement": placement, "training__budget__seconds": 1.0}
    changes["training__budget__steps"] = None
    first, second = on_two_ranks(RANKS, tmp_path / "run", changes)
    assert first["compute"]["steps"] == second["compute"]["steps"] > 0
    assert first["compute"]["rank_spread"] >= 1.0
    assert first["compute"]["evaluation"] > 0
    assert first["metrics"]["quality/q"] is not None
