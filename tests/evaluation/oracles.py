"""Networks that know the answer, and a small data set, for the tests of this room."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from raysched.config.run import PredictionType
from raysched.data.dataset import ImageDataset
from raysched.diffusion.schedules import NoiseSchedule

SHAPE = (1, 4, 4)


def knowing_x0(
    x0_of_class: Tensor, schedule: NoiseSchedule, prediction_type: PredictionType
) -> Callable[..., Tensor]:
    """The exact network of data with one image per class: (num_classes + 1, C, H, W)."""
    if schedule.is_flow:
        known_times, table = None, None
    else:
        u = torch.arange(1, schedule.num_train_timesteps + 1) / schedule.num_train_timesteps
        known_times, table = torch.arange(len(u)), torch.stack(schedule.alpha_sigma(u))

    def network(*, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        if table is None:
            sigma = timestep.double() / 1000.0
            alpha = 1.0 - sigma
        else:
            assert known_times is not None
            # rk4 asks between indices; linear in the logarithm as definitions have it.
            left = timestep.double().floor().long().clamp(0, len(known_times) - 1)
            right = (left + 1).clamp_max(len(known_times) - 1)
            ratio = (table[1] / table[0]).log()
            log_ratio = ratio[left] + (timestep.double() - left) * (ratio[right] - ratio[left])
            alpha = (1 + (2 * log_ratio).exp()).rsqrt()
            sigma = (1 - alpha**2).sqrt()
        alpha, sigma = (v[:, None, None, None].to(sample) for v in (alpha, sigma))
        x0 = x0_of_class[class_labels].to(sample)
        eps = (sample - alpha * x0) / sigma
        return {
            "sample": x0,
            "epsilon": eps,
            "v_prediction": alpha * eps - sigma * x0,
            "flow_matching": eps - x0,
        }[prediction_type]

    return network


def striped_classes(num_per_class: int = 40, noise: float = 0.1, seed: int = 0) -> ImageDataset:
    """Two classes of 4 x 4 images: bright left half or bright right half, plus pixel noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(2 * num_per_class) % 2
    images = class_images().numpy()[labels] + noise * rng.standard_normal((len(labels), *SHAPE))
    pixels = ((images.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    indices = np.arange(len(labels))
    return ImageDataset(
        images=pixels,
        labels=labels.astype(np.int64),
        class_names=("left", "right"),
        train_indices=indices[: len(labels) // 2],
        holdout_indices=indices[len(labels) // 2 :],
        fingerprint=f"stripes-{num_per_class}-{noise}-{seed}",
    )


def class_images() -> Tensor:
    """(3, 1, 4, 4): the noise-free image of each class and a grey one for the null class."""
    images = torch.full((3, *SHAPE), -0.5)
    images[0, :, :, :2] = 0.5
    images[1, :, :, 2:] = 0.5
    images[2] = 0.0
    return images
