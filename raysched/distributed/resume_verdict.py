"""What a proof of `raysched verify-resume` found: two runs compared number by number, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raysched.training.costs import is_timing
from raysched.training.result import RunResult, read_result
from raysched.training.run_folder import read_metrics

COMPUTE = ("forward_equivalents", "rollout", "training", "evaluation", "steps")


@dataclass(frozen=True)
class Difference:
    """The first number in which a resumed run differs.

    Attributes:
        kill: number of the kill, from 1.
        step: optimizer steps where it shows.
        key: the metric's name, `weights_sha256`, or `compute/…` of the result.
        expected: in the straight run.
        got: in the resumed one; None where it is missing.
    """

    kill: int
    step: int
    key: str
    expected: Any
    got: Any


@dataclass(frozen=True)
class Kill:
    """One kill and what came of it.

    Attributes:
        step: last logged step before the kill; 0 before the first one.
        resumed_from: step of the newest checkpoint that the kill left; None if there was none.
        difference: the first one; None if there is none.
    """

    step: int
    resumed_from: int | None
    difference: Difference | None


@dataclass(frozen=True)
class Verdict:
    """What a proof found.

    Attributes:
        all_kills: in their order.
        weights_sha256: of the straight run.
        folder: where the runs are; None if they were removed.
        seconds: wall time of everything.
    """

    all_kills: tuple[Kill, ...]
    weights_sha256: str
    folder: str | None
    seconds: float

    @property
    def identical(self) -> int:
        """Kills whose run ended like the straight one."""
        return sum(kill.difference is None for kill in self.all_kills)

    @property
    def holds(self) -> bool:
        """Whether all of them did."""
        return self.identical == len(self.all_kills)

    @property
    def first_difference(self) -> Difference | None:
        """Of the first kill that has one."""
        found = (kill.difference for kill in self.all_kills)
        return next((difference for difference in found if difference is not None), None)

    def as_json(self) -> dict[str, Any]:
        """The object of `--json`."""
        first = self.first_difference
        return {
            "kills": len(self.all_kills),
            "identical": self.identical,
            "first_difference": None if first is None else asdict(first),
            "all_kills": [
                {"step": k.step, "resumed_from": k.resumed_from} for k in self.all_kills
            ],
            "weights_sha256": self.weights_sha256,
            "folder": self.folder,
            "seconds": round(self.seconds, 1),
        }

    def as_text(self) -> str:
        """The verdict for a person."""
        line = f"identical: {self.identical} of {len(self.all_kills)} killed and resumed runs"
        kept = [f"the runs are kept in {self.folder}"] if self.folder else []
        return "\n".join([line, *kept])


def compare_runs(straight: Path, resumed: Path, kill: int) -> Difference | None:
    """The first difference between two finished runs: points in order, then the weights.

    Args:
        straight: folder of the uninterrupted run.
        resumed: folder of the other.
        kill: the other's number.
    """
    expected, got = _points(straight), _points(resumed)
    for step in sorted(expected.keys() | got.keys()):
        difference = _first(expected.get(step, {}), got.get(step, {}))
        if difference is not None:
            return Difference(kill, step, *difference)
    ends = [read_result(folder) for folder in (straight, resumed)]
    one, other = ({} if end is None else _end(end) for end in ends)
    difference = _first(one, other)
    step = max(expected, default=0)
    return None if difference is None else Difference(kill, step, *difference)


def _points(run_dir: Path) -> dict[int, dict[str, Any]]:
    """What each step's points say, clocks left out, and how many points it has."""
    found: dict[int, dict[str, Any]] = {}
    for point in read_metrics(run_dir):
        place = found.setdefault(point["step"], {"points": 0})
        place["points"] += 1
        place["forward_equivalents"] = point["forward_equivalents"]
        place |= {k: v for k, v in point["metrics"].items() if not is_timing(k)}
    return found


def _end(result: RunResult) -> dict[str, Any]:
    compute = {f"compute/{key}": result.compute.get(key) for key in COMPUTE}
    metrics = {key: value for key, value in result.metrics.items() if not is_timing(key)}
    return {"weights_sha256": result.weights_sha256, **compute, **metrics}


def _first(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    for key in [*one, *(key for key in other if key not in one)]:
        expected, got = one.get(key), other.get(key)
        both_nan = expected != expected and got != got
        if key not in one or key not in other or not (expected == got or both_nan):
            return key, expected, got
    return None
