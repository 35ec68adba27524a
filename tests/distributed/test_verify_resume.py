"""`verify-resume`: real kills end identically, planted differences are found, nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from raysched.cli import main
from raysched.config.loading import write_yaml
from raysched.distributed.child_run import ChildRun, wait_for
from raysched.distributed.resume_verdict import Difference, Kill, Verdict, compare_runs
from raysched.errors import RunFailedError
from tests.training.runs import rollout_config, run_loop

COMMAND = [sys.executable, "-m", "raysched", "verify-resume"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("verify") / "straight"
    run_loop(rollout_config(training__budget__steps=6), run_dir)
    return run_dir


@pytest.fixture
def other(straight: Path, tmp_path: Path) -> Path:
    """The same run once more, to be tampered with."""
    shutil.copytree(straight, tmp_path / "other")
    return tmp_path / "other"


def change_points(run_dir: Path, change) -> None:
    path = run_dir / "metrics.jsonl"
    points = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(point) + "\n" for point in change(points)))


def change_result(run_dir: Path, **changes: object) -> None:
    path = run_dir / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_clocks_alone_make_no_difference(straight, other):
    def slower(points):
        for point in points:
            point["seconds"] += 5.0
            point["metrics"]["compute/rollout_seconds"] += 1.0
            point["metrics"]["compute/fe_per_second"] = 1.0
        return points

    change_points(other, slower)
    assert compare_runs(straight, other, 1) is None


def test_the_last_bit_of_a_loss_is_found(straight, other):
    found = []

    def wrong(points):
        loss = points[3]["metrics"]["train/loss"]
        points[3]["metrics"]["train/loss"] = loss * (1 + 2**-52)
        points[5]["metrics"]["train/loss"] = 0.0
        found.append(loss)
        return points

    change_points(other, wrong)
    difference = compare_runs(straight, other, 2)
    assert (difference.kill, difference.step, difference.key) == (2, 4, "train/loss")
    assert difference.expected == found[0] != difference.got


@pytest.mark.parametrize(
    ("change", "step", "key"),
    [
        (lambda points: points[:4] + points[5:], 5, "points"),
        (lambda points: points + points[-1:], 6, "points"),
        (lambda points: [*points, {**points[-1], "step": 7}], 7, "points"),
    ],
    ids=["missing", "twice", "one too many"],
)
def test_a_point_too_few_or_too_many_is_found(straight, other, change, step, key):
    change_points(other, change)
    difference = compare_runs(straight, other, 1)
    assert (difference.step, difference.key) == (step, key)


def test_other_weights_behind_equal_losses_are_found(straight, other):
    change_result(other, weights_sha256="0" * 64)
    difference = compare_runs(straight, other, 1)
    assert (difference.step, difference.key) == (6, "weights_sha256")
    assert difference.got == "0" * 64
    (other / "result.json").unlink()
    assert compare_runs(straight, other, 1).got is None


def test_the_verdict_counts_and_names_the_first_difference():
    first = Difference(2, 40, "train/loss", 1.0, 2.0)
    kills = (Kill(10, None, None), Kill(40, 25, first), Kill(60, 50, None))
    verdict = Verdict(kills, "ab", None, 1.0)
    told = verdict.as_json()
    assert (told["kills"], told["identical"]) == (3, 2)
    assert told["first_difference"] == {
        "kill": 2,
        "step": 40,
        "key": "train/loss",
        "expected": 1.0,
        "got": 2.0,
    }
    assert not verdict.holds
    assert Verdict(kills[:1], "ab", None, 1.0).as_json()["first_difference"] is None


def test_what_can_not_be_proved_is_refused(tmp_path, capsys, fresh_signals):
    in_seconds = ["verify-resume", "training.budget.seconds=3"]
    assert main([*in_seconds, "training.budget.forward_equivalents=null"]) == 2
    assert "budget.seconds" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["verify-resume", "--out", str(tmp_path)]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_killed_at_random_moments_end_identically(tmp_path):
    # Killed drivers of Ray workers: test_launch, test_lost_workers.
    config = rollout_config(training__budget__steps=80, training__checkpoint_every_steps=25)
    write_yaml(config, tmp_path / "config.yaml")
    out = tmp_path / "proof"
    done = subprocess.run(
        [*COMMAND, "config.yaml", "--kills", "3", "--seed", "6", "--out", str(out), "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["kills"], told["identical"], told["first_difference"]) == (3, 3, None)
    killed = told["all_kills"]
    assert all(kill["step"] < 80 for kill in killed)
    assert killed[0]["resumed_from"] >= 25
    assert killed[1]["step"] <= 25
    for number in (1, 2, 3):
        assert compare_runs(out / "straight", out / f"kill-{number:02d}", number) is None
        # The kill was real: the first child said nothing of an end, the second one did.
        said = (out / f"kill-{number:02d}.log").read_text()
        assert said.count("run folder:") == 2
        assert said.count("status: finished") == 1
    change_result(out / "kill-01", weights_sha256="")
    assert compare_runs(out / "straight", out / "kill-01", 1) is not None


@pytest.mark.slow
def test_an_interrupt_leaves_no_child_and_no_folder(tmp_path):
    write_yaml(
        rollout_config(training__budget__steps=10**6, training__log_every_steps=10),
        tmp_path / "config.yaml",
    )
    process = subprocess.Popen(
        [*COMMAND, "config.yaml"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (children := psutil.Process(process.pid).children(recursive=True)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no child within 60 s"
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, err
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_child_that_stands_still_or_fails_is_told_with_its_last_words(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: none\n")
    run_dir = tmp_path / "run"
    with ChildRun(tmp_path / "config.yaml", run_dir) as child:
        wait_for(child, lambda: child.ended, stall_s=60.0)
        assert "seed" in str(child.failure("did not finish"))
        assert child.code == 2
        with pytest.raises(RunFailedError, match=r"stood still for 0 s"):
            wait_for(child, lambda: False, stall_s=0.1)
