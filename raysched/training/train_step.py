"""One optimizer step: noise, roll out, regress, step.

Legend: B samples of the global batch, b of them on this rank, R rolled out, C, H, W image dims.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from raysched.diffusion.losses import plain_loss, reflexflow_loss
from raysched.diffusion.randomness import generator
from raysched.training.batch import Batch, draw_batch
from raysched.training.feed import Feed
from raysched.training.inputs import TrainingInputs
from raysched.training.methods import METHODS
from raysched.training.setup import Run
from raysched.training.strategies import gradient_sync


@dataclass(frozen=True)
class StepResult:
    """What a step reports.

    Attributes:
        loss: mean over the global batch.
        grad_norm: before clipping, of the synchronised gradient.
        bad_samples: global indices of all ranks' samples whose loss is no finite number.
        fallback_samples: global indices of the samples of all ranks whose rollouts ended in no
            finite number, if they are more than the run allows; else empty.
        rollout: `rollout/…` metrics of the global batch.
    """

    loss: float
    grad_norm: float
    bad_samples: tuple[int, ...]
    fallback_samples: tuple[int, ...]
    rollout: dict[str, float]

    @property
    def failed(self) -> bool:
        """Whether the run must end here."""
        finite = math.isfinite(self.loss) and math.isfinite(self.grad_norm)
        return bool(self.fallback_samples) or not finite

    def metrics(self) -> dict[str, float]:
        """The step's numbers under their metric names."""
        return {"train/loss": self.loss, "train/grad_norm": self.grad_norm, **self.rollout}

    def describe_failure(self) -> str:
        """In words, what was not finite."""
        if self.fallback_samples:
            share = f"{self.rollout['rollout/fallbacks']:.0%} of the step's rollouts"
            named = _named(self.fallback_samples)
            return f"the network returned no finite number in {share}, those of samples {named}"
        if self.bad_samples:
            named = _named(self.bad_samples)
            return f"the loss of {len(self.bad_samples)} samples is {self.loss} ({named})"
        if not math.isfinite(self.loss):
            return f"the loss is {self.loss}"
        return f"the gradient's norm is {self.grad_norm} (on this or another rank)"


def _named(samples: tuple[int, ...]) -> str:
    return ", ".join(map(str, samples[:5])) + (", …" if len(samples) > 5 else "")


def train_step(run: Run, step: int, feed: Feed | None = None) -> StepResult:
    """Train on one global batch; the caller has set the learning rate.

    Args:
        run: this rank's run; its weights, EMA and meter change unless the loss is not finite.
        step: number of the step, from 0.
        feed: where the batch comes from, and where the next step's is ordered; without one the
            batch is made here.
    """
    with run.meter.timed("data"):
        batch = draw_batch(run, step) if feed is None else feed.take(step)
    inputs = METHODS[run.config.exposure](run, batch)
    # The rollouts are over: their noise and tables need no memory during the backward pass.
    batch = replace(batch, planned=None)
    # Dropout draws from the global stream; set per step, it needs no place in a checkpoint.
    torch.manual_seed(generator(run.config.seed, "dropout", step, run.rank).initial_seed())
    run.network.train()
    losses = []
    # DDP averages over the ranks; what is wanted is the mean over all rows, wherever they are.
    rows_of_ranks = inputs.rows_per_rank or (len(batch.x0),) * run.world_size
    rows_per_rank = sum(rows_of_ranks) / run.world_size
    parts = micro_batches(run, len(inputs.sample), max(rows_of_ranks))
    for number, rows in enumerate(parts, start=1):
        sync = gradient_sync(run.network, run.accelerator, last=number == len(parts))
        with sync, run.meter.timed("training"):
            with run.meter.timed("forward"):
                # Any row will do where only another rank has some left; it adds nothing.
                loss = sample_losses(run, inputs, rows if len(rows) else torch.zeros(1).long())
                loss = loss if len(rows) else 0.0 * loss
            if feed is not None and number == 1:
                feed.order_after(step)
            with run.meter.timed("backward"):
                run.accelerator.backward(loss.sum() / rows_per_rank)
            losses.append(loss.detach()[: len(rows)])
    per_sample = torch.cat(losses)
    with run.meter.timed("training"), run.meter.timed("optimizer"):
        grad_norm = _apply_gradient(run, per_sample)
    run.meter.gradient(sum(rows_of_ranks))
    return _result(run, batch, inputs, per_sample, grad_norm)


def micro_batches(run: Run, num_rows: int, most_rows: int) -> tuple[Tensor, ...]:
    """Split this rank's rows into as many micro-batches as every other rank makes.

    Args:
        run: this rank's run.
        num_rows: rows of this rank.
        most_rows: rows of the rank that has most.

    Returns:
        (m,) rows each; empty at the end where there are fewer rows than micro-batches.
    """
    least = run.config.training.gradient_accumulation
    number = max(least, -(-most_rows // run.micro_batch_size))
    return torch.arange(num_rows).tensor_split(number)


def sample_losses(run: Run, inputs: TrainingInputs, rows: Tensor) -> Tensor:
    """Loss per sample of a micro-batch, with gradient.

    Args:
        run: this rank's run.
        inputs: what the network is trained on in this step.
        rows: (m,) the micro-batch's rows.

    Returns:
        (m,).
    """
    settings = run.config.rollout
    sample, target, rolled = inputs.sample[rows], inputs.target[rows], inputs.rolled[rows]
    if inputs.jump is not None:
        sample, target = inputs.jump.remake(rows)
        rolled = rolled & ~inputs.jump.failed[rows]
    timestep = run.schedule.model_time(inputs.u[rows]).to(sample)
    with run.accelerator.autocast():
        prediction = run.network(
            sample=sample, timestep=timestep, class_labels=inputs.labels[rows]
        )
    if not (inputs.num_rolled and settings.reflexflow):
        return plain_loss(prediction, target)
    clean = inputs.clean_prediction
    return reflexflow_loss(
        prediction,
        target,
        sample,
        inputs.x0[rows],
        None if clean is None else clean[rows],
        alpha=settings.reflexflow_alpha,
        beta1=settings.reflexflow_beta1,
        beta2=settings.reflexflow_beta2,
        norm=settings.reflexflow_norm,
        rolled=rolled,
    )


def _apply_gradient(run: Run, per_sample: Tensor) -> float:
    """Clip, step and average; nothing changes where the gradient is not finite."""
    limit = run.config.optimizer.max_grad_norm
    parameters = list(run.network.parameters())
    norm = run.accelerator.clip_grad_norm_(parameters, math.inf if limit is None else limit)
    grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    scaled = getattr(run.accelerator, "scaler", None) is not None
    finite = math.isfinite(grad_norm)
    # fp16's loss scaling meets infinite gradients by design, skips the step and lowers the scale.
    if finite or scaled:
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if finite:
        run.ema.update(run.policy, run.config.training.batch_size)
    return 0.0 if scaled and not finite and bool(torch.isfinite(per_sample).all()) else grad_norm


def _result(
    run: Run, batch: Batch, inputs: TrainingInputs, per_sample: Tensor, grad_norm: float
) -> StepResult:
    """Sum up over the ranks, count the rollouts' forwards, and take means."""
    failed = inputs.failed if inputs.jump is None else inputs.jump.failed
    loss, rows, num_rolled, num_forwards, num_steps, total_drift, fallbacks, original = _sums(
        run, inputs, per_sample, failed
    )
    run.meter.forward("rollout", round(num_forwards))
    size, per_rolled = run.config.training.batch_size, max(num_rolled, 1.0)
    bad = inputs.batch_rows[~torch.isfinite(per_sample).cpu()]
    # The sum is the same number everywhere: all ranks go and look for its samples, or none.
    bad_samples = () if math.isfinite(loss) else _of_all_ranks(run, batch, bad)
    return StepResult(
        loss=loss / rows,
        grad_norm=grad_norm,
        bad_samples=bad_samples,
        fallback_samples=_too_many(run, batch, failed, fallbacks, num_rolled),
        rollout={
            "rollout/fraction": num_rolled / size,
            "rollout/mean_offset": num_steps / per_rolled,
            # Of the global batch's draws, which every rank knows.
            "rollout/clamped": batch.plan.num_clamped / size,
            "rollout/drift": total_drift / per_rolled,
            "rollout/fallbacks": fallbacks / per_rolled,
            "rollout/original_targets": original / per_rolled,
            "rollout/forwards": num_forwards,
        },
    )


def _sums(
    run: Run, inputs: TrainingInputs, per_sample: Tensor, failed: Tensor | None
) -> list[float]:
    """Over all ranks: loss, rows, R, forwards, steps, drift, fallbacks, original targets."""
    drift, spent = inputs.drift, inputs.num_forwards
    if inputs.jump is not None:
        drift, spent = inputs.jump.drift, spent + inputs.jump.num_forwards
    sums = torch.tensor(
        [
            float(per_sample.double().sum()),
            len(per_sample),
            inputs.num_rolled,
            spent,
            inputs.num_steps,
            float(drift),
            0 if failed is None else int(failed.sum()),
            inputs.num_original,
        ],
        dtype=torch.float64,
    )
    if run.world_size > 1:
        sums = sums.to(run.device)
        torch.distributed.all_reduce(sums)
    values: list[float] = sums.tolist()
    return values


def _too_many(
    run: Run, batch: Batch, failed: Tensor | None, fallbacks: float, num_rolled: float
) -> tuple[int, ...]:
    """Samples of all ranks whose rollouts failed, if they are more than the run allows.

    A single one never stops a run, unless the share allowed is 0: with few rollouts in a step
    it would be more than any share.
    """
    allowed = run.config.rollout.max_fallback_share
    if fallbacks <= allowed * num_rolled or (fallbacks < 2 and allowed > 0):
        return ()
    mine = failed.cpu() if failed is not None else torch.zeros(0, dtype=torch.long)
    return _of_all_ranks(run, batch, mine)


def _of_all_ranks(run: Run, batch: Batch, mine: Tensor) -> tuple[int, ...]:
    """Global indices of samples that each rank picks among its own; all ranks must call it."""
    size = run.config.training.batch_size
    marks = torch.zeros(size, device=run.device)
    places = batch.sample_indices[mine] - batch.step * size
    marks[places.to(run.device)] = 1.0
    if run.world_size > 1:
        torch.distributed.all_reduce(marks)
    return tuple((torch.nonzero(marks.cpu())[:, 0] + batch.step * size).tolist())
