"""The rollouts of one optimizer step on this rank: self-made latents, and what they cost.

Legend: b samples of this rank, E states on the way that are trained on too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raysched.diffusion.calls import CallOptions, NoiseSource
from raysched.diffusion.packing import calls_needed
from raysched.diffusion.parameterization import add_noise
from raysched.diffusion.programs import solver_program
from raysched.diffusion.randomness import generator, normals
from raysched.diffusion.reuse import passed_states
from raysched.diffusion.rollout import plan_calls, rollout
from raysched.diffusion.transfer import to_device
from raysched.training.batch import Batch, PlannedRollout
from raysched.training.setup import Run
from raysched.training.targets import without_target

# Forwards of one rollout that have ancestral noise of their own: ten times the finest grid.
FORWARDS_PER_SAMPLE = 2**20


@dataclass(frozen=True)
class RolledInputs:
    """What the rollouts made.

    Attributes:
        sample: (b, C, H, W), x_hat_t where `rolled`, x_t elsewhere.
        clean_prediction: (b, C, H, W), the prediction at x_t of rolled samples (0 elsewhere);
            None unless ReflexFlow's frequency compensation is on.
        kept: (E, C, H, W), states on the way; None if none was asked for.
        rolled: (b,) bool on the device, samples that are trained on at x_hat_t.
        failed: (b,) bool on the device, rollouts that ended in no finite number; their sample
            is x_t, their clean prediction 0.
        num_forwards: sample-forwards that it took on this rank.
        drift: summed over the rolled samples, root mean square distance from x_t.
    """

    sample: Tensor
    clean_prediction: Tensor | None
    kept: Tensor | None
    rolled: Tensor
    failed: Tensor
    num_forwards: int
    drift: Tensor


def wants_clean(run: Run) -> bool:
    """Whether ReflexFlow's frequency compensation asks for predictions at x_t."""
    settings = run.config.rollout
    return bool(settings.reflexflow) and settings.reflexflow_alpha != 0


def row_mask(mask: Tensor, like: Tensor) -> Tensor:
    """A (b,) mask, on the device of `like` and broadcastable against it."""
    return to_device(mask, like.device).reshape(-1, *(1,) * (like.ndim - 1))


def roll_out(
    run: Run, batch: Batch, x_t: Tensor, planned: PlannedRollout, *, with_gradient: bool = False
) -> RolledInputs:
    """Let the policy's weights generate the inputs of the samples with k > 0.

    Args:
        run: this rank's run; its meter gets the seconds, the caller counts the forwards.
        batch: the rank's samples and their plan.
        x_t: (b, C, H, W), the teacher-forced inputs.
        planned: of the batch, made with the same `with_gradient`.
        with_gradient: keep the graph, and leave the clean predictions to `clean_predictions`.
    """
    if with_gradient:  # within the training step, whose seconds are counted already
        return _made(run, batch, x_t, planned, with_gradient=True)
    with run.meter.timed("rollout"):
        return _made(run, batch, x_t, planned, with_gradient=False)


def _made(
    run: Run, batch: Batch, x_t: Tensor, planned: PlannedRollout, *, with_gradient: bool
) -> RolledInputs:
    settings, plan, calls = run.config.rollout, batch.plan, planned.calls
    # The source shares the target's noise: the rollout's error is the model's alone.
    x_source = add_noise(batch.x0, batch.eps, *run.schedule.alpha_sigma(plan.source_u))
    if settings.dropout:
        seed = generator(run.config.seed, "rollout_dropout", batch.step, run.rank).initial_seed()
        torch.manual_seed(seed)
    run.policy.train(settings.dropout)
    if settings.policy == "ema":
        run.follow_average()
    # Around all calls: the weights' casts to the run's precision are kept from call to call.
    with run.accelerator.autocast():
        result = rollout(
            PolicyNetwork(run, batch),
            x_source,
            calls,
            x_t if calls.with_clean else None,
            with_gradient=with_gradient,
        )
    made = [part for part in (result.x_hat, result.clean_pred) if part is not None]
    finite = torch.stack([part.isfinite().flatten(1).all(dim=1) for part in made]).all(dim=0)
    rolled = to_device(plan.rolled, x_t.device)
    fits = to_device(~without_target(run, plan.target_u), x_t.device)
    # Rows that were not rolled out keep the teacher-forced input bit for bit.
    sample = torch.where(row_mask(rolled & finite & fits, x_t), result.x_hat, x_t)
    clean = result.clean_pred
    if clean is not None:
        clean = torch.where(row_mask(finite, clean), clean, torch.zeros_like(clean))
    distance = (sample.detach() - x_t).flatten(1).square().mean(dim=1).sqrt()
    return RolledInputs(
        sample=sample,
        clean_prediction=clean,
        kept=result.kept,
        rolled=rolled & finite & fits,
        failed=rolled & ~finite,
        num_forwards=result.num_forwards,
        drift=distance.sum(),
    )


def plan_rollout(run: Run, batch: Batch, *, with_gradient: bool = False) -> PlannedRollout:
    """The calls of this rank's rollouts, as many on every rank; the weights are not needed."""
    settings = run.config.rollout
    capacity = run.micro_batch_size
    with_clean = wants_clean(run) and not with_gradient
    passed = passed_states(batch.plan, run.schedule, settings)
    options = CallOptions(
        with_clean=with_clean,
        guidance_scale=settings.guidance_scale,
        bucket=settings.bucket,
        noise=ancestral_noise(run, batch) if settings.ancestral else None,
        kept=None if with_gradient else passed,
    )
    if run.world_size > 1 and not settings.jump_gradient:
        most = _most_calls(run, batch, capacity // options.lanes_per_row, with_clean)
        options = CallOptions(**{**vars(options), "least_calls": most})
    calls = plan_calls(
        batch.plan,
        run.schedule,
        solver=settings.sampler,
        prediction_type=run.config.prediction_type,
        capacity=capacity,
        order=settings.order,
        options=options,
        device=batch.x0.device,
        dtype=batch.x0.dtype,
    )
    return PlannedRollout(calls, passed)


def _most_calls(run: Run, batch: Batch, capacity: int, with_clean: bool) -> int:
    """Calls of the rank that needs most; every rank knows all plans."""
    settings = run.config.rollout
    price = solver_program(settings.sampler, settings.order).forwards_per_step
    needed = []
    for plan in batch.plans:
        lengths = price * plan.num_steps
        if with_clean:
            lengths = torch.cat([lengths, plan.rolled.long()])
        needed.append(calls_needed(lengths, max(capacity, 1)))
    return max(needed)


class PolicyNetwork:
    """The policy with the batch's labels built in; lane b + i is sample i without its label."""

    def __init__(self, run: Run, batch: Batch) -> None:
        blind = torch.full_like(batch.labels, run.dataset.num_classes)
        self._run, self._labels = run, torch.cat([batch.labels, blind])
        self._average = run.config.rollout.policy == "ema"

    def __call__(
        self, *, sample: Tensor, timestep: Tensor, lanes: Tensor, given: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """Predict: (n, C, H, W), (n,), (n,) -> (n, C, H, W)."""
        if given:
            labels, *known = given
        else:
            labels, known = self._labels.index_select(0, lanes), []
        return self._run.predict(
            sample, timestep, labels, average=self._average, given=tuple(known)
        )

    def prepare(self, timestep: Tensor, lanes: Tensor) -> tuple[Tensor, ...]:
        """The labels (W,), and what depends on them and the times (W,) alone, if it can be had."""
        labels = self._labels.index_select(0, lanes)
        made = self._run.prepare(timestep, labels, average=self._average)
        return (labels, *made) if made else ()


def ancestral_noise(run: Run, batch: Batch) -> NoiseSource:
    """Fresh noise per sample and forward, whichever rank or call makes it."""
    shape = tuple(batch.eps.shape[1:])

    def noise(*, samples: Tensor, forwards: Tensor) -> Tensor:
        keys = batch.sample_indices[samples] * FORWARDS_PER_SAMPLE + forwards
        return normals(run.config.seed, "ancestral", batch.step, keys, shape)

    return noise


@torch.no_grad()
def clean_predictions(run: Run, batch: Batch, x_t: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions at x_t of the rolled samples, apart from any rollout.

    Returns:
        (b, C, H, W), 0 elsewhere, and (b,) bool, whose prediction was no finite number.
    """
    chosen = torch.nonzero(batch.plan.rolled)[:, 0]
    timestep = to_device(run.schedule.model_time(batch.plan.target_u), x_t.device, x_t.dtype)
    network, clean = PolicyNetwork(run, batch), torch.zeros_like(x_t)
    run.policy.train(run.config.rollout.dropout)
    for part in _parts(chosen, run.micro_batch_size):
        clean[part] = network(sample=x_t[part], timestep=timestep[part], lanes=part.to(x_t.device))
    failed = ~clean.isfinite().flatten(1).all(dim=1)
    return torch.where(row_mask(failed, clean), torch.zeros_like(clean), clean), failed


def _parts(rows: Tensor, size: int) -> Sequence[Tensor]:
    """Rows in parts of at most so many; none if there are none."""
    return torch.split(rows, size) if len(rows) else ()
