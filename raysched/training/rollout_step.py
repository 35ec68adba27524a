"""The rollouts of one optimizer step on this rank: self-made latents, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raysched.diffusion.parameterization import add_noise
from raysched.diffusion.rollout import plan_calls, rollout
from raysched.training.batch import Batch
from raysched.training.setup import Run


@dataclass(frozen=True)
class RolledInputs:
    """What the rollouts made.

    Attributes:
        sample: (b, C, H, W), x_hat_t where rolled out, x_t elsewhere.
        clean_prediction: (b, C, H, W), the prediction at x_t of rolled samples (0 elsewhere);
            None unless ReflexFlow's frequency compensation is on.
        num_forwards: sample-forwards that it took on this rank.
        drift: summed over the rolled samples, root mean square distance from x_t.
    """

    sample: Tensor
    clean_prediction: Tensor | None
    num_forwards: int
    drift: float


def roll_out(run: Run, batch: Batch, x_t: Tensor) -> RolledInputs:
    """Let the current weights generate the inputs of the samples with k > 0.

    Args:
        run: this rank's run; its meter gets the seconds, the caller counts the forwards.
        batch: the rank's samples and their plan, at least one of them rolled out.
        x_t: (b, C, H, W), the teacher-forced inputs.
    """
    with run.meter.timed("rollout"):
        sample, clean, num_forwards = _generate(run, batch, x_t)
        drift = float((sample - x_t).flatten(1).square().mean(dim=1).sqrt().sum())
    return RolledInputs(sample, clean, num_forwards, drift)


def _generate(run: Run, batch: Batch, x_t: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """Self-made latents, clean predictions if wanted, and this rank's forwards."""
    settings, plan = run.config.rollout, batch.plan
    with_clean = bool(settings.reflexflow) and settings.reflexflow_alpha != 0
    calls = plan_calls(
        plan,
        run.schedule,
        solver=settings.sampler,
        prediction_type=run.config.prediction_type,
        capacity=-(-len(x_t) // run.config.training.gradient_accumulation),
        order=settings.order,
        with_clean=with_clean,
        device=x_t.device,
        dtype=x_t.dtype,
    )
    # The source shares the target's noise: the rollout's error is the model's alone.
    x_source = add_noise(batch.x0, batch.eps, *run.schedule.alpha_sigma(plan.source_u))

    def network(*, sample: Tensor, timestep: Tensor, lanes: Tensor) -> Tensor:
        return run.predict(sample, timestep, batch.labels[lanes])

    run.policy.eval()
    result = rollout(network, x_source, calls, x_t if with_clean else None)
    # Rows that were not rolled out keep the teacher-forced input bit for bit.
    rows = plan.rolled.to(x_t.device).reshape(-1, *(1,) * (x_t.ndim - 1))
    return torch.where(rows, result.x_hat, x_t), result.clean_pred, result.num_forwards
