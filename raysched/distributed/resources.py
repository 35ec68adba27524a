"""Whether the cluster can hold a run's workers, in words; nothing waits for that in silence."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raysched.config.run import ScalingConfig
from raysched.distributed.runtime import started_here
from raysched.errors import ConfigError
from raysched.signals import STOP

POLL_S = 0.5
ASK_S = 10.0
# Placing a group takes seconds on a busy machine: less waiting than this is no news.
PATIENCE_S = 5.0


class StoppedWaitingError(Exception):
    """A stop was asked for while there was no room yet; nothing has failed."""


def bundle(scaling: ScalingConfig) -> dict[str, float]:
    """What one worker asks of its node."""
    gpus = {"GPU": 1.0} if scaling.use_gpu else {}
    return {"CPU": float(scaling.cpus_per_worker), **gpus}


def num_bundles(scaling: ScalingConfig) -> int:
    """How many bundles a run takes; without workers one, for its own process."""
    return max(1, scaling.num_workers)


def patience(scaling: ScalingConfig) -> float:
    """Seconds to wait for room; infinite where the user set no limit."""
    return math.inf if scaling.resource_timeout_s is None else scaling.resource_timeout_s


def shortage(scaling: ScalingConfig, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Why the workers can't all be placed; None if they can.

    Args:
        scaling: the run's.
        nodes: resources of each living node.
    """
    one = bundle(scaling)
    count = num_bundles(scaling)
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


def check_resources(
    scaling: ScalingConfig,
    say: Callable[[str], None],
    stop: Callable[[], object] = lambda: STOP.requested,
) -> None:
    """Wait for a cluster that may still grow, refuse one that is too small.

    A cluster that this process started can't grow: it is refused at once.

    Args:
        scaling: the run's.
        say: told once that there is something to wait for.
        stop: true once a stop was asked for, which ends the wait.

    Raises:
        StoppedWaitingError: a stop was asked for first.
        ConfigError: what is missing, and how to ask for less.
    """
    problem = shortage(scaling, living_nodes())
    if problem is None:
        return
    limit = 0.0 if started_here() else patience(scaling)
    if not limit:
        raise ConfigError(problem)
    until = f"up to {limit:g} s for it" if limit < math.inf else "for it"
    say(f"{problem}; waiting {until} to grow (scaling.resource_timeout_s)")
    deadline, next_time = time.monotonic() + limit, 0.0
    try:
        while problem is not None and time.monotonic() < deadline:
            if stop():
                raise StoppedWaitingError
            if time.monotonic() >= next_time:
                # The cluster knows the latest request only: others take theirs back.
                _ask_autoscaler([bundle(scaling)] * num_bundles(scaling))
                next_time = time.monotonic() + ASK_S
            time.sleep(POLL_S)
            problem = shortage(scaling, living_nodes())
    finally:
        # It holds until the next one, beyond this process's end: nodes would never go again.
        _ask_autoscaler([])
    if problem is not None:
        raise ConfigError(problem)


def _ask_autoscaler(bundles: list[dict[str, float]]) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)


class RoomWatch:
    """Tells the user of a sweep that there is no room for a trial any more, and when there is.

    The trials themselves wait as long as it takes, each in its own log.

    Args:
        scaling: the base run's.
        say: tells it.
        clock: seconds.
    """

    def __init__(
        self,
        scaling: ScalingConfig,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scaling, self._say, self._clock = scaling, say, clock
        self._next, self._short = 0.0, False

    def look(self) -> None:
        """Look at the nodes, not too often."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + PATIENCE_S
        problem = shortage(self._scaling, living_nodes())
        if problem is not None and not self._short:
            self._say(f"{problem}; the sweep waits for nodes, Ctrl-C stops it resumably")
        if problem is None and self._short:
            self._say("there is room for a trial again")
        self._short = problem is not None


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
        over = now - self._since >= max(patience(self._scaling), PATIENCE_S)
        news = not self._told and now - self._since >= PATIENCE_S / 2
        self._told = self._told or news
        return (problem if news or over else None), over

    @property
    def waiting(self) -> bool:
        """Whether the workers wait for room, for longer than a start takes."""
        return self._told

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
