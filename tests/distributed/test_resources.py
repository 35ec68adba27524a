"""Waiting for a cluster that may still grow, with the cluster played by a list of nodes."""

from __future__ import annotations

import pytest

from raysched.distributed import resources
from raysched.distributed.resources import (
    PlacementWatch,
    RoomWatch,
    StoppedWaitingError,
    check_resources,
)
from raysched.errors import ConfigError
from tests.training.runs import small_config


class GrowingCluster:
    """Nodes as they are at each look, and what the autoscaler was asked for."""

    def __init__(self, *looks: list[dict[str, float]]) -> None:
        self.looks = list(looks)
        self.asked: list[list[dict[str, float]]] = []

    def nodes(self) -> list[dict[str, float]]:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> GrowingCluster:
    """An empty head that others started, and a node of two CPUs at the third look."""
    cluster = GrowingCluster([], [], [{"CPU": 2.0}])
    monkeypatch.setattr(resources, "living_nodes", cluster.nodes)
    monkeypatch.setattr(resources, "started_here", lambda: False)
    monkeypatch.setattr(resources, "POLL_S", 0.0)
    monkeypatch.setattr(
        "ray.autoscaler.sdk.request_resources", lambda bundles: cluster.asked.append(bundles)
    )
    return cluster


def test_the_autoscaler_is_asked_for_room_once_and_the_request_is_taken_back(cluster):
    said: list[str] = []
    check_resources(small_config(scaling__num_workers=2).scaling, said.append)
    assert cluster.asked == [[{"CPU": 1.0}] * 2, []]
    assert len(said) == 1
    assert "need 2 CPUs, the cluster has 0" in said[0]
    assert "waiting up to 60 s for it to grow" in said[0]


def test_the_request_is_taken_back_from_a_cluster_that_stays_too_small(cluster):
    cluster.looks = [[], [{"CPU": 2.0}]]
    scaling = small_config(scaling__num_workers=4, scaling__resource_timeout_s=0.05).scaling
    with pytest.raises(ConfigError, match="need 4 CPUs, the cluster has 2"):
        check_resources(scaling, lambda text: None)
    assert cluster.asked == [[{"CPU": 1.0}] * 4, []]


def test_a_stop_ends_the_wait_without_a_failure_and_takes_the_request_back(cluster):
    asked = iter([False, True])
    cluster.looks = [[]]
    with pytest.raises(StoppedWaitingError):
        check_resources(small_config(scaling__num_workers=1).scaling, str, lambda: next(asked))
    assert cluster.asked[-1] == []


def test_a_run_without_workers_needs_room_for_its_own_process(cluster):
    scaling = small_config(scaling__num_workers=0, scaling__cpus_per_worker=2).scaling
    check_resources(scaling, lambda text: None)
    assert cluster.asked == [[{"CPU": 2.0}], []]


def test_a_cluster_of_ones_own_and_no_patience_are_refused_at_once(cluster, monkeypatch):
    hasty = small_config(scaling__num_workers=1, scaling__resource_timeout_s=0.0)
    with pytest.raises(ConfigError):
        check_resources(hasty.scaling, lambda text: None)
    monkeypatch.setattr(resources, "started_here", lambda: True)
    cluster.looks = [[]]
    with pytest.raises(ConfigError):
        check_resources(small_config(scaling__num_workers=1).scaling, lambda text: None)
    assert cluster.asked == []


def test_without_a_limit_room_is_waited_for_as_long_as_it_takes(cluster, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(resources, "_groups", dict)
    cluster.looks = [[]]
    scaling = small_config(scaling__num_workers=1, scaling__resource_timeout_s=None).scaling
    watch = PlacementWatch(scaling, clock=lambda: now[0])
    seen = []
    for _ in range(1000):
        now[0] += 10.0
        seen.append(watch.look())
    assert not any(over for _, over in seen)
    assert sum(news is not None for news, _ in seen) == 1
    assert watch.waiting


def test_a_sweeps_user_hears_once_that_there_is_no_room_and_once_that_there_is(cluster):
    now, said = [0.0], []
    room, empty = [{"CPU": 2.0}], []
    cluster.looks = [room, empty, empty, room, room]
    watch = RoomWatch(small_config().scaling, said.append, clock=lambda: now[0])
    for _ in range(8):
        watch.look()
        watch.look()
        now[0] += 5.0
    assert len(said) == 2
    assert "the sweep waits for nodes" in said[0]
    assert said[1] == "there is room for a trial again"


def test_the_autoscaler_is_asked_again_while_others_take_their_requests_back(cluster, monkeypatch):
    monkeypatch.setattr(resources, "ASK_S", 0.0)
    check_resources(small_config(scaling__num_workers=2).scaling, lambda text: None)
    assert cluster.asked == [[{"CPU": 1.0}] * 2, [{"CPU": 1.0}] * 2, []]
