"""The methods that compete with scheduled sampling, one function each.

Each turns a batch into what the network is trained on. Where its strength is 0 (gamma,
probability) it is `teacher_forced` bit for bit. Cost in forward equivalents is named per method,
beside the 3B of the gradient step; B samples in the global batch, b on this rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from raysched.diffusion.curriculum import RolloutPlan
from raysched.diffusion.parameterization import (
    ANCHOR_SIGMA_FLOOR,
    add_noise,
    anchored_target,
    broadcast,
    prediction_target,
    x0_eps_from_prediction,
)
from raysched.diffusion.randomness import normals, uniforms
from raysched.training.batch import Batch
from raysched.training.exposure import scheduled_sampling, teacher_forced
from raysched.training.inputs import TrainingInputs
from raysched.training.setup import Run


def input_perturbation(run: Run, batch: Batch) -> TrainingInputs:
    """Input Perturbation (Ning et al. 2023, arXiv 2301.11706, algorithm 1): noisier inputs.

    x_t = alpha·x0 + sigma·(eps + gamma·xi) with a second noise xi; the target stays that of eps.
    Costs nothing beside the gradient step.
    """
    plain, gamma = teacher_forced(run, batch), run.config.input_perturbation.gamma
    if gamma == 0:
        return plain
    _, sigma = run.schedule.alpha_sigma(batch.plan.target_u)
    xi = _noise(run, batch, "input_perturbation")
    return replace(plain, sample=plain.sample + broadcast(gamma * sigma, xi) * xi)


def mixflow(run: Run, batch: Batch) -> TrainingInputs:
    """MixFlow (Li et al. 2025, arXiv 2512.19311): a noisier interpolant than the network is told.

    The network gets time t and the interpolant at sigma + r·gamma·(1 - sigma), r uniform; the
    target stays the path's velocity. The paper also draws t from Beta(2, 1); here t keeps the
    run's own law, so that methods differ in their inputs only. Flow matching only. Costs nothing
    beside the gradient step.
    """
    plain, gamma = teacher_forced(run, batch), run.config.mixflow.gamma
    if gamma == 0:
        return plain
    _, sigma = run.schedule.alpha_sigma(batch.plan.target_u)
    share = uniforms(run.config.seed, "mixflow", batch.step, batch.sample_indices)[:, 0]
    slowed = sigma + gamma * share * (1 - sigma)
    return replace(plain, sample=add_noise(batch.x0, batch.eps, 1 - slowed, slowed))


def dream(run: Run, batch: Batch) -> TrainingInputs:
    """DREAM (Zhou et al. 2023, arXiv 2312.00210, algorithm 3): noise moved by the model's error.

    eps' = eps + sigma^p·(eps - eps_pred) noises the input and makes the target, eps_pred being
    the current model's at x_t; the paper has epsilon models, the other prediction types follow
    from x0 and eps'. Costs B.
    """
    plain = teacher_forced(run, batch)
    alpha, sigma = run.schedule.alpha_sigma(batch.plan.target_u)
    everyone = torch.arange(len(batch.x0))
    with run.meter.timed("rollout"):
        _, eps_pred = _estimate(run, batch, plain.sample, plain.u, everyone, len(everyone))
        share = broadcast(sigma**run.config.dream.power, eps_pred)
        eps = batch.eps + share * (batch.eps - eps_pred)
        sample = add_noise(batch.x0, eps, alpha, sigma)
        drift = _distance(sample, plain.sample)
    target = prediction_target(run.config.prediction_type, batch.x0, eps, alpha, sigma)
    return replace(
        plain,
        sample=sample,
        target=target,
        num_forwards=len(batch.x0),
        num_rolled=len(batch.x0),
        drift=drift,
    )


def self_correction(run: Run, batch: Batch) -> TrainingInputs:
    """One-step self-correction: the model's own x0, noised again, with the true x0 as target.

    At a source time uniform in (t, 1] the current model estimates x0 (without gradient, clipped
    to the images' range); the estimate is noised at t, and the target is the one that leads from
    there to the true x0. The noise is drawn anew, as in multistep consistency sampling (Song et
    al. 2023, arXiv 2303.01469, algorithm 1) and in the backward simulation of DMD2 (Yin et al.
    2024, arXiv 2405.14867); `noise: same` keeps the sample's own. Where sigma < 0.05 the target
    would divide by almost nothing, and the sample stays plain. Costs 1 per corrected sample.
    """
    plain, plan = teacher_forced(run, batch), batch.plan
    alpha, sigma = run.schedule.alpha_sigma(plan.target_u)
    corrected = _corrected(run, plan)
    chosen = torch.nonzero(corrected)[:, 0]
    most = max(int(_corrected(run, of_rank).sum()) for of_rank in batch.plans)
    if not most:
        return plain
    with run.meter.timed("rollout"):
        x_source = add_noise(batch.x0, batch.eps, *run.schedule.alpha_sigma(plan.source_u))
        x0_pred, _ = _estimate(run, batch, x_source, plan.source_u, chosen, most)
        fresh = run.config.self_correction.noise == "fresh"
        noise = (_noise(run, batch, "self_correction") if fresh else batch.eps)[chosen]
        x_hat = add_noise(x0_pred.clamp(-1, 1), noise, alpha[chosen], sigma[chosen])
        aimed = add_noise(batch.x0[chosen], noise, alpha[chosen], sigma[chosen])
        drift = _distance(x_hat, aimed)
    target = anchored_target(
        run.config.prediction_type,
        batch.x0[chosen],
        x_hat,
        alpha[chosen],
        sigma[chosen],
        plain.target[chosen],
    )
    place = chosen.to(x_hat.device)
    return replace(
        plain,
        sample=plain.sample.index_copy(0, place, x_hat),
        target=plain.target.index_copy(0, place, target),
        rolled=corrected,
        num_forwards=len(chosen),
        num_rolled=len(chosen),
        num_steps=len(chosen),
        drift=drift,
    )


def _corrected(run: Run, plan: RolloutPlan) -> Tensor:
    """(b,) bool: the samples that self-correction changes."""
    _, sigma = run.schedule.alpha_sigma(plan.target_u)
    return plan.rolled & (sigma >= ANCHOR_SIGMA_FLOOR)


def defar(run: Run, batch: Batch) -> TrainingInputs:
    """DEFAR (Huang et al. 2026, arXiv 2606.28226): train on one's own jump of random length.

    Every sample jumps by the model's velocity from a noisier time, uniform in (t, 1], to t; the
    loss is ReflexFlow's anti-drift term plus its frequency-compensated flow-matching loss towards
    the target that leads to x0. It is scheduled sampling with `grid: jump` for every sample.
    With `jump_gradient` the gradient flows through the jump into the prediction that made it;
    labels, targets, the drift's direction and weights are constants.

    Costs B for the jump (3B with its gradient) and B for the clean prediction unless alpha is 0:
    5/3 of plain training, 7/3 with the gradient.

    The one-step simulation and the sum of the two terms are the paper's. It has published no
    code, and these are not verified against it: the law of the jump's length, whether the
    gradient flows through it, and that the compensated loss lies at the self-made state.
    """
    return scheduled_sampling(run, batch)


def _estimate(
    run: Run, batch: Batch, x: Tensor, u: Tensor, chosen: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """x0 and eps that the current weights see in chosen rows of x at u, without gradient.

    `most` is the number of rows of the rank that chooses most: all make as many calls.
    """
    with torch.no_grad():
        parts = [_implied(run, batch, x, u, part) for part in _micro_batches(run, chosen, most)]
    return torch.cat([x0 for x0, _ in parts]), torch.cat([eps for _, eps in parts])


def _implied(
    run: Run, batch: Batch, x: Tensor, u: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    alpha, sigma = run.schedule.alpha_sigma(u[chosen])
    prediction = _predict(run, batch, x, u, chosen)
    return x0_eps_from_prediction(run.config.prediction_type, prediction, x[chosen], alpha, sigma)


def _predict(run: Run, batch: Batch, x: Tensor, u: Tensor, chosen: Tensor) -> Tensor:
    """The current weights' prediction in eval mode for chosen rows of x, which lie at u."""
    run.policy.eval()
    # A call that only keeps the ranks in step is made with any row.
    asked = chosen if len(chosen) else torch.zeros(1, dtype=torch.int64)
    timestep = run.schedule.model_time(u[asked]).to(x)
    return run.predict(x[asked], timestep, batch.labels[asked])[: len(chosen)]


def _micro_batches(run: Run, chosen: Tensor, most: int) -> list[Tensor]:
    """Chosen rows in parts no larger than a micro-batch, the memory that training needs anyway.

    As many parts as `most` rows make; those at the end may be empty.
    """
    size = run.micro_batch_size
    return [chosen[start : start + size] for start in range(0, most, size)]


def _noise(run: Run, batch: Batch, purpose: str) -> Tensor:
    """Unit Gaussian noise for the batch from a stream of its own, (b, C, H, W)."""
    shape = tuple(batch.eps.shape[1:])
    indices = batch.sample_indices
    noise = normals(run.config.seed, purpose, batch.step, indices, shape)
    return noise.to(batch.eps)


def _distance(a: Tensor, b: Tensor) -> float:
    """Root mean square distances, summed over the samples."""
    return float((a - b).flatten(1).square().mean(dim=1).sqrt().sum())
