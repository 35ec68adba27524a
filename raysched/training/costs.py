"""What a run costs while it runs: speed, where the time goes, utilisation, spread of the ranks.

Rates and shares are of the wall time between two logged points; `share_other` is what no timer
covers (Python between the parts, waiting for reports). Backward contains the gradient's
synchronisation. On CUDA the network's parts are device time, the others the host's.
"""

from __future__ import annotations

import time

import torch

from raysched.diffusion.compute import Phase, forward_flops
from raysched.models.networks import build_network
from raysched.training.peaks import known_peak
from raysched.training.setup import Run

# Disjoint parts of the wall time; their shares and `share_other` make 1.
SHARES: tuple[Phase, ...] = (
    "rollout",
    "forward",
    "backward",
    "optimizer",
    "data",
    "checkpoint",
    "evaluation",
)
# What a rank does before it has to wait for the others: here a slow one shows.
OWN_WORK: tuple[Phase, ...] = ("data", "rollout", "forward")


def is_timing(name: str) -> bool:
    """Whether a metric depends on the clock: two runs of the same numbers differ in it."""
    timed = ("second", "share_", "rank_", "mfu")
    return name.startswith("compute/") and any(part in name for part in timed)


class Costs:
    """One rank's account since the last logged point and since the process began.

    Args:
        run: the run; its meter has the seconds.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._peak = peak_flops(run)
        self._flops = float(sample_flops(run)) if self._peak is not None else 0.0
        self._spread: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Begin anew, as after a checkpoint was restored."""
        self._begun = self._now = self._state()

    def window(self) -> dict[str, float]:
        """The numbers since the last call; a collective where there are several ranks."""
        before, self._now = self._now, self._state()
        steps = max(self._now["steps"] - before["steps"], 1.0)
        own = sum(self._now[phase] - before[phase] for phase in OWN_WORK) / steps
        self._spread = _spread(self._run, own)
        return {**self._between(before, self._now), **self._spread}

    def total(self) -> dict[str, float]:
        """The numbers since the process began or resumed; no collective."""
        return {**self._between(self._begun, self._state()), **self._spread}

    def _state(self) -> dict[str, float]:
        run = self._run
        return {
            "wall": time.perf_counter(),
            "steps": float(run.step),
            "fe": float(run.meter.forward_equivalents),
            **{phase: run.meter.seconds(phase) for phase in SHARES},
        }

    def _between(self, before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
        spent = {key: now[key] - before[key] for key in now}
        wall = max(spent["wall"], 1e-9)
        # Evaluations and checkpoints have shares of their own; the speed is the training's.
        seconds = max(wall - spent["evaluation"] - spent["checkpoint"], 1e-9)
        shares = {f"share_{phase}": spent[phase] / wall for phase in SHARES}
        found = {
            "fe_per_second": spent["fe"] / seconds,
            "samples_per_second": spent["steps"] * self._run.config.training.batch_size / seconds,
            **shares,
            "share_other": max(1.0 - sum(shares.values()), 0.0),
        }
        if self._peak is not None:
            peak = self._peak * self._run.world_size
            found["mfu"] = found["fe_per_second"] * self._flops / peak
        return found


def _spread(run: Run, own_seconds: float) -> dict[str, float]:
    """Seconds per step that the slowest and the fastest rank need for their own work."""
    if run.world_size == 1:
        return {}
    ends = torch.tensor([own_seconds, -own_seconds], dtype=torch.float64, device=run.device)
    torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MAX)
    slowest, fastest = float(ends[0]), -float(ends[1])
    return {
        "rank_step_slowest": slowest,
        "rank_step_fastest": fastest,
        "rank_spread": slowest / max(fastest, 1e-9),
    }


def peak_flops(run: Run) -> float | None:
    """FLOP/s that one worker's device can do at the run's precision; None where unknown."""
    told = run.config.scaling.peak_tflops
    if told is not None:
        return told * 1e12
    if run.device.type != "cuda":
        return None
    precision = run.config.training.precision
    if precision == "fp32" and torch.backends.cuda.matmul.allow_tf32:
        return known_peak(torch.cuda.get_device_name(run.device), "tf32")
    return known_peak(torch.cuda.get_device_name(run.device), precision)


def sample_flops(run: Run) -> int:
    """Floating-point operations of one sample-forward, counted on a copy without storage."""
    data, config = run.dataset, run.config
    with torch.device("meta"):
        network = build_network(
            config.model, data.channels, data.image_size, data.num_classes, seed=config.seed
        )
    shape = (data.channels, data.image_size, data.image_size)
    return forward_flops(network.eval(), shape, "meta")
