"""Finds hung workers by their signs of life, has their stacks written, and ends them.

A worker hangs if its process shows no life (it is stopped, or stuck in C code), or if no rank gets
on any more; then those with the fewest steps are named. The end of a process is a lost worker to
Ray Train, which starts the group again from the last checkpoint, counted under
`scaling.max_failures`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysched.training.heartbeat import WORKERS_FOLDER, Beat, dump_stacks, read_beats

Strike = Callable[[Beat, Path, bool], str | None]
# A node that doesn't run a task within this time is lost; Ray will find that out.
STRIKE_TIMEOUT_S = 60.0


@dataclass
class Seen:
    """A rank's newest beat, and when its numbers last changed by this process's clock."""

    beat: Beat
    alive: float
    working: float


class Watchdog:
    """Looks after the workers of one start of a run.

    Args:
        run_dir: the run's folder.
        attempt: the start.
        timeout_s: `scaling.hang_timeout_s`.
        strike: writes a rank's stacks, and ends it if told so.
        clock: seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        attempt: str,
        timeout_s: float,
        strike: Strike,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_dir, self._attempt, self._timeout_s = run_dir, attempt, timeout_s
        self._strike, self._clock = strike, clock
        self._seen: dict[int, Seen] = {}
        self._done: set[tuple[int, float]] = set()
        self._next = 0.0

    def look(self) -> str | None:
        """Look at the files, not too often; what was done about a hang in words, or None."""
        now = self._clock()
        if now < self._next:
            return None
        self._next = now + min(self._timeout_s / 4, 5.0)
        self._read(now)
        hung = self._hung(now)
        return self._end(hung) if hung else None

    def _read(self, now: float) -> None:
        beats = read_beats(self._run_dir, self._attempt)
        current = [b for b in beats if not b.ended and (b.pid, b.started) not in self._done]
        self._seen = {
            beat.rank: _updated(self._seen.get(beat.rank), beat, now) for beat in current
        }

    def _hung(self, now: float) -> list[Beat]:
        seen = list(self._seen.values())
        frozen = [s.beat for s in seen if now - s.alive > self._timeout_s]
        if frozen or not seen or any(now - s.working <= self._timeout_s for s in seen):
            return frozen
        fewest = min(s.beat.step for s in seen)
        return [s.beat for s in seen if s.beat.step == fewest]

    def _end(self, hung: Sequence[Beat]) -> str | None:
        others = [s.beat for s in self._seen.values() if s.beat not in hung]
        # Where the others wait belongs to the picture; they go with their group.
        for beat in others:
            self._strike(beat, self._run_dir, False)
        states = {beat.rank: self._strike(beat, self._run_dir, True) for beat in hung}
        self._done |= {(s.beat.pid, s.beat.started) for s in self._seen.values()}
        # One that is gone has been lost, not hung: Ray Train sees to it.
        named = [beat for beat in hung if states[beat.rank] is not None]
        if not named:
            return None
        words = ", ".join(
            f"rank {beat.rank} (last step {beat.step}, process {states[beat.rank]})"
            for beat in named
        )
        return (
            f"no progress for {self._timeout_s:g} s: {words}: ended, to be started again from the "
            f"last checkpoint; stacks in {self._run_dir / WORKERS_FOLDER}"
        )


def _updated(before: Seen | None, beat: Beat, now: float) -> Seen:
    if before is None or (before.beat.pid, before.beat.started) != (beat.pid, beat.started):
        return Seen(beat, now, now)
    alive = before.alive if beat.beats == before.beat.beats else now
    working = before.working if beat.work == before.beat.work else now
    return Seen(beat, alive, working)


def strike_in_cluster(beat: Beat, run_dir: Path, kill: bool) -> str | None:
    """`dump_stacks` on the rank's own node; None if the node is away."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id=beat.node, soft=False)
    task: Any = ray.remote(num_cpus=0, max_retries=0)(dump_stacks)
    try:
        state: str | None = ray.get(
            task.options(scheduling_strategy=there).remote(beat, run_dir, kill=kill),
            timeout=STRIKE_TIMEOUT_S,
        )
    except ray.exceptions.RayError:
        return None
    return state
