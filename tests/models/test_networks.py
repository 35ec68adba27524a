import pytest
import torch

from raysched.config.run import ModelConfig
from raysched.errors import ConfigError
from raysched.models.networks import build_network
from raysched.models.weights import weights_sha256

SMALL_DIT = {"kind": "dit", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
CONFIGS = {
    "unet": {},
    "unet with attention": {"attention": True},
    "unconditional unet": {"class_conditional": False},
    "dit": SMALL_DIT,
    "unconditional dit": {**SMALL_DIT, "class_conditional": False},
}


def network_for(name, image_size=8, channels=1, seed=0, **options):
    """A network whose output depends on all inputs: no layer is left at zero."""
    config = ModelConfig(**{**CONFIGS[name], **options})
    network = build_network(config, channels, image_size, 10, seed=seed)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def inputs(image_size=8, channels=1, batch=3):
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(batch, channels, image_size, image_size, generator=generator),
        "timestep": torch.tensor([3.0, 500.25, 999.0])[:batch],
        "class_labels": torch.tensor([0, 9, 10])[:batch],
    }


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("image_size", "channels"), [(8, 1), (28, 1), (16, 3)])
def test_the_prediction_has_the_shape_of_the_sample(name, image_size, channels):
    network = network_for(name, image_size, channels)
    given = inputs(image_size, channels)
    output = network(**given)
    assert output.shape == given["sample"].shape
    assert output.dtype == torch.float32
    assert output.isfinite().all()


def test_the_demos_unet_has_about_165_thousand_parameters():
    network = build_network(ModelConfig(), 1, 8, 10)
    assert 155_000 < sum(p.numel() for p in network.parameters()) < 175_000


@pytest.mark.parametrize("name", CONFIGS)
def test_every_sample_has_its_own_time_and_a_fraction_of_a_step_counts(name):
    network, given = network_for(name), inputs()
    alone = [
        network(**{key: value[row : row + 1] for key, value in given.items()}) for row in range(3)
    ]
    torch.testing.assert_close(network(**given), torch.cat(alone), rtol=1e-4, atol=1e-5)
    whole = network(**{**given, "timestep": given["timestep"].floor()})
    change = (whole - network(**given)).abs().amax(dim=(1, 2, 3))
    assert change[1] > 1e-6
    assert change[[0, 2]].max() < 1e-6


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_every_label_and_the_null_class_change_the_prediction(name):
    network, given = network_for(name), inputs(batch=1)
    outputs = [network(**{**given, "class_labels": torch.tensor([label])}) for label in range(11)]
    for first in range(11):
        for second in range(first):
            assert (outputs[first] - outputs[second]).abs().max() > 1e-4
    none = network(sample=given["sample"], timestep=given["timestep"])
    torch.testing.assert_close(none, outputs[network.null_class], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["unconditional unet", "unconditional dit"])
def test_an_unconditional_network_does_not_see_the_label(name):
    network, given = network_for(name), inputs()
    other = {**given, "class_labels": torch.tensor([5, 10, 1])}
    assert torch.equal(network(**given), network(**other))


@pytest.mark.parametrize("name", CONFIGS)
def test_train_mode_without_dropout_draws_nothing(name):
    network, given = network_for(name).train(), inputs()
    before = torch.random.get_rng_state()
    first = network(**given)
    assert torch.equal(torch.random.get_rng_state(), before)
    # DiT as it comes from diffusers drops a tenth of the labels here.
    for _ in range(30):
        assert torch.equal(network(**given), first)


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_the_seed_determines_the_weights_and_the_global_state_stays(name):
    config = ModelConfig(**CONFIGS[name])
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = weights_sha256(build_network(config, 1, 8, 10, seed=3).state_dict())
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert weights_sha256(build_network(config, 1, 8, 10, seed=3).state_dict()) == first
    assert weights_sha256(build_network(config, 1, 8, 10, seed=4).state_dict()) != first


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_half_precision_still_tells_neighbouring_times_apart(name):
    network = network_for(name).to(torch.bfloat16)
    sample = inputs()["sample"].to(torch.bfloat16)
    labels = torch.zeros(3, dtype=torch.int64)
    seen = []
    network.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
    )
    output = network(
        sample=sample, timestep=torch.tensor([997.0, 998.5, 999.0]), class_labels=labels
    )
    assert output.dtype == torch.bfloat16
    assert seen[0].tolist() == [997.0, 998.5, 999.0]


def test_gradients_reach_every_parameter_that_is_used():
    for name in ("unet", "dit"):
        network = network_for(name)
        network(**inputs()).square().mean().backward()
        idle = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
        # An embedding has gradients in the rows of the labels given; the rest must have some.
        assert idle == []


@pytest.mark.parametrize(
    ("options", "image_size", "words"),
    [
        ({"block_out_channels": (8, 8, 8, 8)}, 28, "28 -> 14 -> 7.*at most 3 levels"),
        ({"block_out_channels": (8, 8)}, 9, "go 9 and then no further.*multiple of 2"),
        ({"block_out_channels": (8, 12, 20)}, 8, "norm_num_groups = 8, got 12, 20"),
        ({"kind": "dit", "patch_size": 3}, 28, "patch_size: must divide.*28 pixels, got 3"),
        ({"kind": "dit", "num_attention_heads": 1, "attention_head_dim": 6}, 8, "got 6"),
    ],
)
def test_an_architecture_that_does_not_fit_says_which_and_how_to_mend(options, image_size, words):
    with pytest.raises(ConfigError, match=words):
        build_network(ModelConfig(**options), 1, image_size, 10)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_three_levels_fit_28_pixels(levels):
    network = build_network(ModelConfig(block_out_channels=(8,) * levels), 1, 28, 10)
    assert network(**inputs(28)).shape == (3, 1, 28, 28)
