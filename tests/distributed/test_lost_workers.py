"""Workers killed, hung, without room or with their node: the run ends as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import threading

import pytest

from raysched.config.loading import write_yaml
from raysched.distributed.launch import run_training
from raysched.errors import LostResourcesError
from raysched.training.events import read_events
from raysched.training.heartbeat import WORKERS_FOLDER
from raysched.training.run_folder import open_run_folder, read_metrics
from tests.distributed.waiting import beats, wait_until
from tests.training.runs import rollout_config, run_loop, small_config
from tests.training.test_resume import start, wait_for_step


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_and_hung_workers_cost_nothing_but_time(tmp_path, ray_session):
    """SIGKILL to one rank, then SIGSTOP to the other: the end is that of an undisturbed run."""
    config = rollout_config(
        training__budget__steps=250,
        training__checkpoint_every_steps=20,
        scaling__num_workers=2,
        scaling__hang_timeout_s=3.0,
    )
    run_dir = tmp_path / "run"
    open_run_folder(config, run_dir, resume=False)
    ended: dict = {}

    def train() -> None:
        ended["result"] = run_training(config, run_dir=run_dir, report=lambda metrics: None)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()

    def two_past(step: int, without: set[int]):
        now = beats(run_dir)
        fresh = len(now) == 2 and not without & {b["pid"] for b in now}
        return now if fresh and min(b["step"] for b in now) >= step else None

    first = wait_until(lambda: two_past(25, set()), "two workers past step 25")
    os.kill(first[1]["pid"], signal.SIGKILL)
    gone = {b["pid"] for b in first}
    second = wait_until(lambda: two_past(30, gone), "two new workers past step 30")
    os.kill(second[0]["pid"], signal.SIGSTOP)
    thread.join(timeout=240)
    assert "result" in ended, read_events(run_dir)
    straight_dir = tmp_path / "straight"
    open_run_folder(config, straight_dir, resume=False)
    straight = run_training(config, run_dir=straight_dir, report=lambda metrics: None)
    assert ended["result"].status == straight.status == "finished"
    assert ended["result"].weights_sha256 == straight.weights_sha256
    points, expected = (read_metrics(folder) for folder in (run_dir, straight_dir))
    assert [p["step"] for p in points] == [p["step"] for p in expected]
    losses = [[p["metrics"]["train/loss"] for p in some] for some in (points, expected)]
    assert losses[0] == losses[1]
    events = "\n".join(read_events(run_dir))
    assert "rank 1 was lost" in events
    assert "rank 0 (last step" in events
    assert "stopped" in events
    # It may have been stopped between two steps, but always within the loop.
    assert "in until_end" in (run_dir / WORKERS_FOLDER / "rank-00000.stacks.txt").read_text()


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_in_use_is_waited_for_aloud_and_not_for_ever(tmp_path, ray_session, caplog):
    from ray.util import placement_group, remove_placement_group

    config = small_config(scaling__num_workers=2, scaling__resource_timeout_s=6.0)
    open_run_folder(config, tmp_path / "run", resume=False)
    other = placement_group([{"CPU": 1}])
    assert other.wait(30)
    try:
        with pytest.raises(LostResourcesError, match=r"no room for 2 workers: .* free"):
            run_training(config, run_dir=tmp_path / "run", report=lambda metrics: None)
    finally:
        remove_placement_group(other)
    assert "no room for 2 workers" in caplog.text


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_lost_node_costs_one_interval_where_another_has_room(tmp_path, monkeypatch):
    """Two nodes with one CPU each and a head without: the one that trains is killed."""
    from ray.cluster_utils import Cluster

    config = rollout_config(
        training__budget__steps=250,
        training__checkpoint_every_steps=20,
        scaling__num_workers=1,
    )
    write_yaml(config, tmp_path / "config.yaml")
    # What the master takes for a lost node comes at once; its defaults wait half a minute.
    system = {"health_check_period_ms": 500, "health_check_failure_threshold": 2}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": system}
    )
    process = None
    try:
        nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=1) for _ in "ab")}
        run_dir = tmp_path / "run"
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        process = start(run_dir, "--json")
        wait_for_step(process, run_dir, 30)
        (beat,) = wait_until(lambda: beats(run_dir), "a sign of life")
        cluster.remove_node(nodes[beat["node"]], allow_graceful=False)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert any("rank 0 was lost" in event for event in read_events(run_dir))
    finally:
        if process is not None:
            process.kill()
            process.wait()
        cluster.shutdown()
    straight = run_loop(config, tmp_path / "straight")
    assert json.loads(out)["weights_sha256"] == straight.weights_sha256


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_sigterm_while_a_run_waits_for_its_first_node_is_a_resumable_stop(tmp_path):
    from ray.cluster_utils import Cluster

    write_yaml(small_config(scaling__num_workers=1), tmp_path / "config.yaml")
    run_dir = tmp_path / "run"
    cluster, process = Cluster(initialize_head=True, head_node_args={"num_cpus": 0}), None
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_ADDRESS", cluster.address)
            process = start(run_dir, "--json")
        wait_until(lambda: "waiting up to" in "".join(read_events(run_dir)), "the wait", 60)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        if process is not None:
            process.kill()
            process.wait()
        cluster.shutdown()
    assert process.returncode == 75, err
    assert json.loads(out)["status"] == "stopped"
    assert "Traceback" not in err
