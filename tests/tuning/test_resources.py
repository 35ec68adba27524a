import io

import pytest
from rich.console import Console

from raysched.config.run import RunConfig
from raysched.distributed.resources import StoppedWaitingError
from raysched.errors import ConfigError
from raysched.tuning import search as searching
from raysched.tuning.journal import Journal
from raysched.tuning.search import max_concurrent, search, trial_resources, trials_at_once
from tests.tuning.synthetic import load


def run(**scaling) -> RunConfig:
    return RunConfig.model_validate({"scaling": scaling})


def test_as_many_trials_at_once_as_the_cpus_carry():
    assert max_concurrent(run(), [{"CPU": 2}], None) == 2
    assert max_concurrent(run(num_workers=0, cpus_per_worker=3), [{"CPU": 8}], None) == 2
    assert max_concurrent(run(num_workers=2, cpus_per_worker=2), [{"CPU": 8}], None) == 2
    assert max_concurrent(run(num_workers=2), [{"CPU": 9}], 3) == 3
    assert max_concurrent(run(use_gpu=True, num_workers=2), [{"CPU": 64, "GPU": 4}], None) == 2


def test_a_trial_that_can_never_be_placed_is_refused_before_it_waits_for_ever():
    with pytest.raises(ConfigError, match="each trial needs 3 CPUs, the cluster has 2"):
        max_concurrent(run(num_workers=3), [{"CPU": 2}], None)
    with pytest.raises(ConfigError, match="each trial needs 1 GPUs, the cluster has 0"):
        max_concurrent(run(use_gpu=True), [{"CPU": 2}], None)


def test_a_worker_never_spans_two_nodes():
    two = [{"CPU": 2.0}, {"CPU": 2.0}]
    assert max_concurrent(run(num_workers=0, cpus_per_worker=2), two, None) == 2
    assert max_concurrent(run(num_workers=3), two, None) == 1
    with pytest.raises(ConfigError, match="only 0 fit on the cluster's nodes"):
        max_concurrent(run(num_workers=0, cpus_per_worker=3), two, None)


def test_a_trials_own_process_takes_a_cpu_only_where_it_trains_itself():
    assert trial_resources(run(num_workers=2))["CPU"] == 0
    assert trial_resources(run(num_workers=0, cpus_per_worker=2))["CPU"] == 2


@pytest.fixture
def joined(monkeypatch):
    """A cluster that others started, which carries two trials today."""
    monkeypatch.setattr(searching, "ensure_ray", lambda: None)
    monkeypatch.setattr(searching, "started_here", lambda: False)
    monkeypatch.setattr(searching, "living_nodes", lambda: [{"CPU": 2.0}])


def test_the_users_number_of_trials_stands_where_a_cluster_may_grow(tmp_path, joined, monkeypatch):
    console = Console(file=io.StringIO(), width=200)
    many = load(tmp_path, search={"max_concurrent": 8})
    assert trials_at_once(many, console) == 8
    assert console.file.getvalue() == ""
    assert trials_at_once(load(tmp_path), console) == 2
    assert "2 trials at once" in console.file.getvalue()
    assert "search.max_concurrent=N" in console.file.getvalue()
    monkeypatch.setattr(searching, "started_here", lambda: True)
    assert trials_at_once(many, console) == 2


def test_a_sweep_that_is_stopped_while_it_waits_for_room_is_stopped(tmp_path, joined, monkeypatch):
    def wait(scaling, say):
        say("waiting for it to grow")
        raise StoppedWaitingError

    monkeypatch.setattr(searching, "check_resources", wait)
    console = Console(file=io.StringIO(), width=200)
    loaded = load(tmp_path)
    plan = type("Plan", (), {"budget": loaded.budget})
    assert search(loaded, Journal(tmp_path), plan, None, console)
    assert "waiting for it to grow" in console.file.getvalue()
