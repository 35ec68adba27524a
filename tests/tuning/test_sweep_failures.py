"""Trials, baselines, nodes and objectives that fail: what is a result, and what is begun again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raysched.training.run_folder import read_metrics
from raysched.tuning.journal import Journal, read_events
from raysched.tuning.sweep import retry
from tests.tuning.synthetic import OFFSET, load, synthetic_train
from tests.tuning.test_sweep import ROOT, run, wait_until


@pytest.mark.ray
def test_a_baseline_that_fails_is_an_error_of_the_sweep_and_the_trials_are_kept(
    tmp_path, ray_session
):
    train = synthetic_train(tmp_path / "log", fail_at=0)
    search = {"num_samples": 30, "max_concurrent": 1}
    result, _ = run(load(tmp_path, search=search), train)
    # Nothing else is trained that could not be compared.
    assert len(result.trials) <= 2
    assert (result.status, result.exit_code, result.verdict) == ("failed", 1, None)
    assert "the baseline failed" in result.error
    assert "the disk caught fire" in result.error
    assert "--resume --retry-failed" in result.error
    assert all(trial.status in ("finished", "stopped") for trial in result.trials[1:])


@pytest.mark.ray
def test_a_trial_whose_process_dies_is_a_failed_trial_and_the_sweep_goes_on(
    tmp_path, ray_session, capfd
):
    points = [{OFFSET: k} for k in (3, 1)]
    loaded = load(tmp_path, search={"num_samples": 2, "points": points, "max_concurrent": 1})
    dies = "__import__('os')._exit(1) if K == 3 else 0.1 * K"
    result, _ = run(loaded, synthetic_train(tmp_path / "log", quality=dies))
    assert [trial.status for trial in result.trials] == ["finished", "failed", "finished"]
    assert "its process died" in result.trials[1].error
    assert (Path(result.trials[1].run_dir) / "error.txt").is_file()
    assert result.exit_code == 0
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.ray
def test_failed_trials_are_begun_again_on_request_only_and_nothing_else_is(tmp_path, ray_session):
    points = [{OFFSET: k} for k in (3, 1)]
    search = {"num_samples": 2, "points": points, "max_concurrent": 1}
    loaded = load(tmp_path, search=search, early_stopping={"kind": "none"})
    first, _ = run(loaded, synthetic_train(tmp_path / "log", fail_at=3))
    assert [trial.status for trial in first.trials] == ["finished", "failed", "finished"]
    assert len((tmp_path / "log").read_text().splitlines()) == 3
    train = synthetic_train(tmp_path / "log")
    same, _ = run(loaded, train, resume=True)
    assert [trial.status for trial in same.trials] == ["finished", "failed", "finished"]
    mended, shown = run(loaded, train, resume=True, retry_failed=True)
    assert [trial.status for trial in mended.trials] == ["finished"] * 3
    assert mended.trials[1].assignments == {OFFSET: 3}
    assert mended.trials[1].error is None
    log = (tmp_path / "log").read_text().splitlines()
    assert [line[:3] for line in log] == ["000", "001", "002", "001"]
    assert "trial 001 started" in shown


def test_what_can_not_be_trained_is_a_result_and_not_begun_again(tmp_path):
    journal = Journal(tmp_path)
    ends = {1: {"diverged": True}, 2: {"out_of_memory": True}, 3: {}}
    for number, why in ends.items():
        journal.append("suggested", number, baseline=False, assignments={OFFSET: number})
        journal.append("report", number, q=0.5, forward_equivalents=250.0)
        journal.append("ended", number, status="failed", error="it was so", **why)
    assert [r.infeasible for r in journal.ordered()] == ["diverged", "out of memory", None]
    assert retry(journal) == [3]
    again = Journal(tmp_path).records[3]
    assert (again.status, again.error, again.ended) == ("waiting", None, False)
    # Its evaluations stay: it goes on from its checkpoint.
    assert [point.forward_equivalents for point in again.curve] == [250.0]


@pytest.mark.ray
def test_memory_that_runs_out_is_an_infeasible_trial_and_the_sweep_goes_on(tmp_path, ray_session):
    points = [{OFFSET: k} for k in (3, 1)]
    search = {"num_samples": 2, "points": points, "max_concurrent": 1}
    greedy = "(_ for _ in ()).throw(MemoryError('no room')) if K == 3 else 0.1 * K"
    result, shown = run(
        load(tmp_path, search=search), synthetic_train(tmp_path / "log", quality=greedy)
    )
    assert [trial.infeasible for trial in result.trials] == [None, "out of memory", None]
    assert "trial 001 infeasible: out of memory" in shown
    assert result.exit_code == 0


@pytest.mark.ray
def test_an_objective_that_no_trial_reports_ends_the_sweep_with_the_metrics_that_exist(
    tmp_path, ray_session
):
    loaded = load(
        tmp_path,
        search={"num_samples": 30, "max_concurrent": 1},
        objective={"several": ["quality", "diversity"]},
        early_stopping={"kind": "none"},
    )
    result, _ = run(loaded, synthetic_train(tmp_path / "log"))
    assert (result.status, result.exit_code) == ("failed", 1)
    assert "objective diversity: no trial reported it" in result.error
    assert "the metrics that exist" in result.error
    assert len(result.trials) <= 2


@pytest.mark.ray
def test_a_trials_log_and_output_lie_in_its_folder(tmp_path, ray_session):
    noisy = "print('hello from', K) or 0.1 * K"
    loaded = load(tmp_path, search={"num_samples": 1, "points": [{OFFSET: 3}]})
    result, _ = run(loaded, synthetic_train(tmp_path / "log", quality=noisy))
    folder = Path(result.trials[1].run_dir)
    assert "hello from 3" in (folder / "output.txt").read_text()
    events = (folder / "log.txt").read_text()
    assert OFFSET in events
    assert events.rstrip().endswith("finished")
    assert result.files["trial_logs"].endswith("trials/TRIAL/log.txt")


@pytest.mark.ray
def test_a_process_is_taken_over_from_trial_to_trial_and_the_fixed_cost_is_measured(
    tmp_path, ray_session
):
    search = {"num_samples": 3, "max_concurrent": 1}
    loaded = load(tmp_path, search=search, early_stopping={"kind": "none"})
    result, _ = run(loaded, synthetic_train(tmp_path / "log"))
    assert [trial.new_process for trial in result.trials] == [True, False, False, False]
    logs = [(Path(trial.run_dir) / "log.txt").read_text() for trial in result.trials]
    assert len({log.partition("process ")[2].partition(":")[0] for log in logs}) == 1
    assert result.fixed_cost["num_later"] == 3
    assert result.fixed_cost["work_s"] == pytest.approx(0.25)


CLUSTER_DRIVER = """
import sys
from pathlib import Path
from rich.console import Console
from raysched.tuning.sweep import run_sweep
from tests.tuning.synthetic import known_comparison, load, synthetic_train
folder = Path(sys.argv[1])
train = synthetic_train(folder / "log", wait_for=folder / "go")
search = {"num_samples": 1, "max_concurrent": 1}
result = run_sweep(
    load(folder, search=search, early_stopping={"kind": "none"}), resume=False,
    console=Console(file=(folder / "shown").open("w"), width=200),
    train=train, compare=known_comparison,
)
sys.exit(result.exit_code)
"""


def start_driver(
    folder: Path, address: str, driver: str = CLUSTER_DRIVER
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", driver, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(folder: Path) -> list[tuple[int, str]]:
    """The trials that have ended, and how, in their order."""
    events = read_events(folder / "sweep" / "trials.jsonl")
    return [(e["number"], e["status"]) for e in events if e["event"] == "ended"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_waits_for_the_first_node_of_a_cluster_that_grows(tmp_path):
    """A head without CPUs, as the files in cluster/ have it; a node comes once it is asked for."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    process = None
    try:
        process = start_driver(tmp_path, cluster.address)
        (tmp_path / "go").touch()
        shown = tmp_path / "shown"
        wait_until(lambda: shown.is_file() and "waiting up to" in shown.read_text(), process)
        cluster.add_node(num_cpus=1)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    finally:
        if process is not None:
            process.kill()
            process.wait()
        cluster.shutdown()
    assert ends(tmp_path) == [(0, "finished"), (1, "finished")]


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_that_is_lost_with_its_node_is_begun_again_on_another(tmp_path):
    """A head without CPUs and a node with one, which is killed; then another node comes."""
    from ray.cluster_utils import Cluster

    system = {"health_check_period_ms": 500, "health_check_failure_threshold": 2}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": system}
    )
    process = None
    try:
        node = cluster.add_node(num_cpus=1)
        process = start_driver(tmp_path, cluster.address)
        journal = tmp_path / "sweep" / "trials.jsonl"

        def half_way() -> bool:
            reports = [e for e in read_events(journal) if e["event"] == "report"]
            return sum(e["number"] == 1 for e in reports) == 2

        wait_until(half_way, process)
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1)
        (tmp_path / "go").touch()
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    finally:
        if process is not None:
            process.kill()
            process.wait()
        cluster.shutdown()
    assert ends(tmp_path) == [(0, "finished"), (1, "stopped"), (1, "finished")]
    started = [line[:3] for line in (tmp_path / "log").read_text().splitlines()]
    assert started == ["000", "001", "001"]


NESTED_DRIVER = """
import sys
from pathlib import Path
from rich.console import Console
from raysched.tuning.sweep import run_sweep
from tests.training.runs import SMALL
from tests.tuning.synthetic import known_comparison, load
folder = Path(sys.argv[1])
overrides = {
    **{key: value for key, value in SMALL.items() if "budget" not in key},
    "evaluation.enabled": True, "tracking.enabled": False,
    "scheduled_sampling.probability": 0.5, "training.checkpoint_every_steps": 20,
    "scaling.num_workers": 1, "scaling.resource_timeout_s": 1.0,
}
loaded = load(
    folder, overrides=overrides, budget_forward_equivalents=8000,
    search={"num_samples": 1, "max_concurrent": 1}, early_stopping={"kind": "none"},
)
result = run_sweep(
    loaded, resume=False, console=Console(file=(folder / "shown").open("w"), width=200),
    compare=known_comparison,
)
sys.exit(result.exit_code)
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_trial_whose_worker_is_lost_with_its_node_waits_for_another(tmp_path):
    """The trial's own process sits on the head; its worker's node goes, another comes late."""
    from ray.cluster_utils import Cluster

    system = {"health_check_period_ms": 500, "health_check_failure_threshold": 2}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": system}
    )
    process = None
    trial, shown = tmp_path / "sweep" / "trials" / "001", tmp_path / "shown"
    try:
        node = cluster.add_node(num_cpus=1)
        process = start_driver(tmp_path, cluster.address, NESTED_DRIVER)

        def half_way() -> bool:
            points = read_metrics(trial)
            return bool(points) and points[-1]["step"] > 30

        wait_until(half_way, process)
        cluster.remove_node(node, allow_graceful=False)
        wait_until(lambda: "the sweep waits for nodes" in shown.read_text(), process)
        # Longer than a run of its own would wait.
        time.sleep(8.0)
        cluster.add_node(num_cpus=1)
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    finally:
        if process is not None:
            process.kill()
            process.wait()
        cluster.shutdown()
    assert ends(tmp_path) == [(0, "finished"), (1, "finished")]
    assert "there is room for a trial again" in shown.read_text()
    assert "rank 0 was lost" in (trial / "log.txt").read_text()
