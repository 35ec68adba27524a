"""One optimizer step: noise, roll out, regress, step.

Legend: B samples of the global batch, b of them on this rank, R rolled out, C, H, W image dims.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raysched.diffusion.losses import plain_loss, reflexflow_loss
from raysched.diffusion.randomness import generator
from raysched.training.batch import draw_batch
from raysched.training.inputs import TrainingInputs
from raysched.training.methods import METHODS
from raysched.training.setup import Run


@dataclass(frozen=True)
class StepResult:
    """What a step reports.

    Attributes:
        loss: mean over the global batch.
        grad_norm: before clipping, of the synchronised gradient.
        bad_samples: global indices of this rank's samples whose loss is no finite number.
        rollout: `rollout/…` metrics of the global batch.
    """

    loss: float
    grad_norm: float
    bad_samples: tuple[int, ...]
    rollout: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """The step's numbers under their metric names."""
        return {"train/loss": self.loss, "train/grad_norm": self.grad_norm, **self.rollout}

    def describe_failure(self) -> str:
        """In words, what was not finite."""
        if self.bad_samples:
            shown = ", ".join(map(str, self.bad_samples[:5]))
            more = ", …" if len(self.bad_samples) > 5 else ""
            return f"the loss of {len(self.bad_samples)} samples is {self.loss} ({shown}{more})"
        if not math.isfinite(self.loss):
            return f"the loss is {self.loss}"
        return f"the gradient's norm is {self.grad_norm} (on this or another rank)"


def train_step(run: Run, step: int) -> StepResult:
    """Train on one global batch; the caller has set the learning rate.

    Args:
        run: this rank's run; its weights, EMA and meter change unless the loss is not finite.
        step: number of the step, from 0.
    """
    batch = draw_batch(run, step)
    inputs = METHODS[run.config.exposure](run, batch)
    # Dropout draws from the global stream; set per step, it needs no place in a checkpoint.
    torch.manual_seed(generator(run.config.seed, "dropout", step, run.rank).initial_seed())
    run.network.train()
    losses = []
    micro_batches = torch.arange(len(batch.x0)).chunk(run.config.training.gradient_accumulation)
    for number, rows in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)
        sync = contextlib.nullcontext() if last else run.accelerator.no_sync(run.network)
        with sync, run.meter.timed("training"):
            loss = sample_losses(run, inputs, rows)
            run.accelerator.backward(loss.sum() / len(batch.x0))
            losses.append(loss.detach())
    per_sample = torch.cat(losses)
    with run.meter.timed("training"):
        grad_norm = _apply_gradient(run, per_sample)
    run.meter.gradient(run.config.training.batch_size)
    bad = inputs.batch_rows[~torch.isfinite(per_sample).cpu()]
    return _result(run, inputs, per_sample, grad_norm, batch.sample_indices[bad])


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
    sample, target = inputs.sample[rows], inputs.target[rows]
    if inputs.jump is not None:
        sample, target = inputs.jump.remake(rows)
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
        rolled=inputs.rolled[rows],
    )


def _apply_gradient(run: Run, per_sample: Tensor) -> float:
    """Clip, step and average; nothing changes where the gradient is not finite."""
    limit = run.config.optimizer.max_grad_norm
    parameters = list(run.network.parameters())
    norm = run.accelerator.clip_grad_norm_(parameters, math.inf if limit is None else limit)
    grad_norm = float(norm)
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
    run: Run, inputs: TrainingInputs, per_sample: Tensor, grad_norm: float, bad: Tensor
) -> StepResult:
    """Sum up over the ranks, count the rollouts' forwards, and take means."""
    sums = torch.tensor(
        [
            float(per_sample.double().sum()),
            inputs.num_rolled,
            inputs.num_forwards,
            inputs.num_steps,
            inputs.drift if inputs.jump is None else inputs.jump.drift,
        ],
        dtype=torch.float64,
    )
    if run.world_size > 1:
        sums = sums.to(run.device)
        torch.distributed.all_reduce(sums)
    loss, num_rolled, num_forwards, num_steps, drift = sums.tolist()
    run.meter.forward("rollout", round(num_forwards))
    size, per_rolled = run.config.training.batch_size, max(num_rolled, 1.0)
    return StepResult(
        loss=loss / size,
        grad_norm=grad_norm,
        bad_samples=tuple(bad.tolist()),
        rollout={
            "rollout/fraction": num_rolled / size,
            "rollout/mean_offset": num_steps / per_rolled,
            "rollout/drift": drift / per_rolled,
        },
    )
