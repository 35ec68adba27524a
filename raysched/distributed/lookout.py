"""What the driver looks after while its workers report nothing.

Workers may hang, they may have lost their place in the cluster, and where there is none of them
nobody but the driver hears of a stop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from raysched.config.run import ScalingConfig
from raysched.distributed.failures import set_fatal
from raysched.distributed.resources import PlacementWatch, StoppedWaitingError, patience
from raysched.distributed.watchdog import Watchdog, strike_in_cluster
from raysched.errors import LostResourcesError, RunFailedError
from raysched.training.stop import StopOrder, StopWatch


def stop_order(run_dir: Path) -> StopOrder | None:
    """How the run was asked to end, read by the driver while there is no worker to do so."""
    return StopWatch(run_dir).requested(at_once=True)


def lookout(
    scaling: ScalingConfig, run_dir: Path, attempt: str, tell: Callable[[str], None]
) -> Callable[[], None]:
    """A function to be called again and again while a start of the run goes on.

    Args:
        scaling: the run's.
        run_dir: its folder.
        attempt: names the start.
        tell: tells the user.

    Returns:
        It raises StoppedWaitingError for a stop while the workers have no place, and
        LostResourcesError once they have had none for too long.
    """
    limit = scaling.hang_timeout_s
    dog = Watchdog(run_dir, attempt, limit, strike_in_cluster) if limit else None
    placement = PlacementWatch(scaling)
    # Ray Train goes on waiting: workers that get their place after all end at once.
    give_up = functools.partial(set_fatal, run_dir, attempt)

    def look() -> None:
        hang = dog.look() if dog else None
        if hang is not None:
            tell(hang)
        news, over = placement.look()
        if placement.waiting and stop_order(run_dir) is not None:
            give_up(RunFailedError("stopped before it had its workers"))
            raise StoppedWaitingError
        if over:
            error = LostResourcesError(
                f"{run_dir}: {news}; waited {patience(scaling):g} s "
                "(scaling.resource_timeout_s); what was computed is kept: go on with --resume"
            )
            give_up(error)
            raise error
        if news is not None:
            tell(news)

    return look
