"""The exact denoiser of a finite set of images: what a perfect model of that set would predict.

For data that are one of R images with equal chance, E[x0 | x_t] is a softmax-weighted mean of the
images (Karras et al. 2022, arXiv 2206.00364, appendix B.3). Rolled out, it drifts from x_t too:
that is posterior variance and no exposure bias, so its drift is the floor of a model's.

The set is the training images, and pairs come from held-out ones. It knows less about those than
a model that generalises, above all at low noise, so the floor is high there: drift above it is
surely no posterior variance, drift below it is no contradiction.

Legend: n rows, R images, C classes, D… sample dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raysched.config.run import PredictionType
from raysched.diffusion.parameterization import broadcast, prediction_target
from raysched.diffusion.schedules import MODEL_TIME_SCALE, NoiseSchedule


class EmpiricalDenoiser:
    """Closed-form network of a set of images; called by keyword like any other network.

    Args:
        images: (R, D…) the set, in [-1, 1].
        labels: (R,) int64 classes; None: the network knows none.
        schedule: the noise schedule.
        prediction_type: what it returns; x0 itself is the most exact.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        schedule: NoiseSchedule,
        prediction_type: PredictionType = "sample",
    ) -> None:
        self._flat = images.flatten(1).double()
        self._squares = self._flat.square().sum(1)
        self._labels, self._schedule = labels, schedule
        self._prediction_type = prediction_type

    def __call__(self, *, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Predict: sample (n, D…), timestep (n,), class_labels (n,) -> (n, D…).

        A label without images, such as the null class, means the whole set.
        """
        alpha, sigma = self.alpha_sigma(timestep)
        x0 = self.posterior_mean(sample, alpha, sigma, class_labels)
        if self._prediction_type == "sample":
            return x0.to(sample.dtype)
        x = sample.double().cpu()
        eps = (x - broadcast(alpha, x) * x0) / broadcast(sigma, x)
        target = prediction_target(self._prediction_type, x0, eps, alpha, sigma)
        return target.to(sample)

    def posterior_mean(
        self, x_t: Tensor, alpha: Tensor, sigma: Tensor, class_labels: Tensor
    ) -> Tensor:
        """E[x0 | x_t, class]: (n, D…) float64; weights prop. to N(x_t; alpha·x0', sigma²).

        Args:
            x_t: (n, D…).
            alpha: (n,).
            sigma: (n,), positive.
            class_labels: (n,) int64.
        """
        flat = x_t.flatten(1).double().cpu()
        out = torch.empty_like(flat)
        for label in sorted(set(class_labels.tolist())):
            rows = torch.nonzero(class_labels.cpu() == label)[:, 0]
            members = self._members(label)
            images, squares = self._flat[members], self._squares[members]
            a, variance = alpha[rows, None], sigma[rows, None].square()
            # |x|² is the same for all images and drops out of the softmax.
            logits = (a * (flat[rows] @ images.T) - 0.5 * a.square() * squares) / variance
            out[rows] = torch.softmax(logits, dim=1) @ images
        return out.view(x_t.shape)

    def alpha_sigma(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, (n,) float64, of what networks get as time.

        rk4 asks between the indices of a DDPM schedule: linear in log(sigma/alpha) there.
        """
        time = timestep.double().cpu()
        if self._schedule.is_flow:
            t = time / MODEL_TIME_SCALE
            return 1 - t, t
        alphas, sigmas = self._schedule.table[:, 1:]
        left = time.floor().long().clamp(0, alphas.numel() - 1)
        right = (left + 1).clamp_max(alphas.numel() - 1)
        ratio = (sigmas / alphas).log()
        between = (ratio[left] + (time - left) * (ratio[right] - ratio[left])).exp()
        alpha = (1 + between.square()).rsqrt()
        return alpha, alpha * between

    def _members(self, label: int) -> Tensor:
        everyone = torch.arange(len(self._flat))
        if self._labels is None:
            return everyone
        members = torch.nonzero(self._labels == label)[:, 0]
        return members if members.numel() else everyone
