"""Whether the cluster can hold a run's workers, in words; nothing waits for that in silence."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raysched.config.run import ScalingConfig
from raysched.errors import ConfigError
from raysched.signals import STOP

POLL_S = 0.5
# Placing a group takes seconds on a busy machine: less waiting than this is no news.
PATIENCE_S = 5.0


def bundle(scaling: ScalingConfig) -> dict[str, float]:
    """What one worker asks of its node."""
    gpus = {"GPU": 1.0} if scaling.use_gpu else {}
    return {"CPU": float(scaling.cpus_per_worker), **gpus}


def shortage(scaling: ScalingConfig, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Why the workers can't all be placed; None if they can.

    Args:
        scaling: the run's.
        nodes: resources of each living node.
    """
    one = bundle(scaling)
    count = scaling.num_workers
    for name, each in one.items():
        need, have = each * count, sum(node.get(name, 0.0) for node in nodes)
        if need > have:
            return (
                f"scaling: {count} workers × {each:g} {name}s need {need:g} {name}s, the cluster "
                f"has {have:g}: {_less(name)}"
            )
    fitting = sum(min(int(node.get(n, 0.0) // each) for n, each in one.items()) for node in nodes)
    if fitting >= count:
        return None
    sizes = "; ".join(
        ", ".join(f"{node.get(name, 0.0):g} {name}s" for name in one) for node in nodes
    )
    words = " and ".join(f"{each:g} {name}s" for name, each in one.items())
    return (
        f"scaling: {count} workers of {words} each, but only {fitting} fit on the cluster's nodes "
        f"({sizes}): lower scaling.num_workers or scaling.cpus_per_worker"
    )


def _less(name: str) -> str:
    if name == "GPU":
        return "lower scaling.num_workers, or set scaling.use_gpu: false"
    return "lower scaling.num_workers or scaling.cpus_per_worker"


def living_nodes() -> list[dict[str, float]]:
    """Resources of each living node of the cluster."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def check_resources(scaling: ScalingConfig, say: Callable[[str], None]) -> None:
    """Wait for a cluster that may still grow, refuse one that is too small.

    A cluster that this process started can't grow: it is refused at once.

    Args:
        scaling: the run's.
        say: told once that there is something to wait for.

    Raises:
        ConfigError: what is missing, and how to ask for less.
    """
    problem = shortage(scaling, living_nodes())
    limit = scaling.resource_timeout_s if os.environ.get("RAY_ADDRESS") else 0.0
    if problem is not None and limit:
        say(f"{problem}; waiting up to {limit:g} s for it to grow (scaling.resource_timeout_s)")
        _ask_autoscaler(scaling)
    deadline = time.monotonic() + limit
    while problem is not None and time.monotonic() < deadline and not STOP.requested:
        time.sleep(POLL_S)
        problem = shortage(scaling, living_nodes())
    if problem is not None:
        raise ConfigError(problem)


def _ask_autoscaler(scaling: ScalingConfig) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[bundle(scaling)] * scaling.num_workers)


class PlacementWatch:
    """Notices that the workers are not running because the cluster has no room for them.

    Args:
        scaling: the run's.
        clock: seconds.
    """

    def __init__(
        self, scaling: ScalingConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._scaling, self._clock = scaling, clock
        self._since: float | None = None
        self._next, self._told = 0.0, False
        # Other runs' groups look alike: this run's is among those that come later.
        self._known = set(_groups())

    def look(self) -> tuple[str | None, bool]:
        """What to say, if it is news, and whether waiting is over."""
        now = self._clock()
        if now < self._next:
            return None, False
        self._next = now + POLL_S
        problem = self._waiting()
        if problem is None:
            self._since, self._told = None, False
            return None, False
        self._since = now if self._since is None else self._since
        # A moment without a place is how every group starts.
        over = now - self._since >= max(self._scaling.resource_timeout_s, PATIENCE_S)
        news = not self._told and now - self._since >= PATIENCE_S / 2
        self._told = self._told or news
        return (problem if news or over else None), over

    def _waiting(self) -> str | None:
        import ray

        lost = shortage(self._scaling, living_nodes())
        if lost is not None:
            return lost
        one = bundle(self._scaling)
        wanted = [one] * self._scaling.num_workers
        own = [
            group["state"]
            for name, group in _groups().items()
            if name not in self._known and list(group["bundles"].values()) == wanted
        ]
        if "CREATED" in own or not {"PENDING", "RESCHEDULING"} & set(own):
            return None
        free = ray.available_resources()
        left = ", ".join(f"{free.get(name, 0.0):g} {name}s" for name in one)
        return (
            f"scaling: no room for {self._scaling.num_workers} workers: the cluster has {left} "
            "free, the rest is in use: lower scaling.num_workers, or end what uses it"
        )


def _groups() -> dict[str, Any]:
    from ray.util import placement_group_table

    groups: dict[str, Any] = placement_group_table()
    return groups
