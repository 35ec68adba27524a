"""A stand-in for training whose quality is known, so that Tune itself can be tested quickly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from raysched.config.space import LoadedSweep, load_sweep

OFFSET = "scheduled_sampling.max_step_offset"


def write_space(folder: Path, **changes: object) -> Path:
    """A small space over the offset K with tracking off and trials in their own process."""
    content = {
        "name": "synthetic",
        "overrides": {
            "tracking.enabled": False,
            "scaling.num_workers": 0,
            "scheduled_sampling.probability": 0.5,
            "training.batch_size": 10,
        },
        "budget_forward_equivalents": 1000,
        "space": {OFFSET: {"choice": [1, 2, 3, 4, 5, 6, 7, 8]}},
        "search": {"num_samples": 4, "seed": 1},
        "output_dir": str(folder / "sweep"),
        **changes,
    }
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def load(folder: Path, **changes: object) -> LoadedSweep:
    return load_sweep(write_space(folder, **changes))


def synthetic_train(
    log: Path, *, quality: str = "0.1 * K - 0.25", fail_at: int = -1, wait_for: Path | None = None
) -> Callable[..., object]:
    """Train in four evaluations; q at the end is `quality`, an expression of K (0: baseline).

    Args:
        log: one line per training that was started.
        quality: q at the budget.
        fail_at: the K whose training raises.
        wait_for: before its third evaluation a candidate waits for this file.
    """

    def train(config, *, run_dir, report, tracking):  # type: ignore[no-untyped-def]
        import json
        import time

        from raysched.training.result import RunResult
        from raysched.training.stop import StopWatch, clear_stop

        clear_stop(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        k = config.scheduled_sampling.max_step_offset
        with log.open("a") as stream:
            stream.write(f"{run_dir.name} seed {config.seed} exposure {config.exposure}\n")
        if k == fail_at:
            raise RuntimeError("the disk caught fire")
        q, watch, status = 0.0, StopWatch(run_dir), "finished"
        for part in (1, 2, 3, 4):
            deadline = time.monotonic() + 60
            while part == 3 and k and wait_for is not None and not wait_for.exists():
                if watch.requested() or time.monotonic() > deadline:
                    break
                time.sleep(0.02)
            request = watch.requested(at_once=True)
            if request is not None:
                status = request.status
                break
            spent = config.training.budget.forward_equivalents * part / 4
            q = eval(quality, {"K": k, "seed": config.seed}) + (4 - part)
            interval = {"quality/q_low": q - 0.01, "quality/q_high": q + 0.01}
            report({"quality/q": q, "compute/forward_equivalents": spent, **interval})
        result = RunResult(
            status=status,
            output_dir=str(run_dir),
            metrics={
                "quality/q": q,
                "quality/q_low": q - 0.01,
                "quality/q_high": q + 0.01,
                "quality/q_epsilon_scaled": q - 0.005,
            },
            compute={"forward_equivalents": spent, "seconds": 0.5, "wall_seconds": 0.25},
        )
        (run_dir / "result.json").write_text(json.dumps(result.as_json()))
        return result

    return train


def known_comparison(baseline, candidates, *, config, seeds):  # type: ignore[no-untyped-def]
    """The difference of the q values, with a narrow interval."""
    from raysched.tuning.verdict import Comparison

    gains = [(c.number, baseline.q - c.q) for c in candidates]
    return [Comparison(n, gain, gain - 0.02, gain + 0.02) for n, gain in gains]
