"""Sampling: exact with an exact network, counted, repeatable, and honest about divergence."""

import pytest
import torch

from raysched.config.run import RunConfig
from raysched.diffusion.compute import ComputeMeter
from raysched.diffusion.schedules import NoiseSchedule
from raysched.evaluation import sampling
from tests.evaluation.oracles import SHAPE, class_images, knowing_x0

PATHS = [
    ("flow_matching", "flow"),
    ("epsilon", "linear"),
    ("v_prediction", "cosine"),
    ("sample", "scaled_linear"),
]


def schedule_of(kind: str) -> NoiseSchedule:
    prediction = "flow_matching" if kind == "flow" else "epsilon"
    config = RunConfig.model_validate(
        {"prediction_type": prediction, "noise_schedule": {"kind": kind}}
    )
    return NoiseSchedule.from_config(config.noise_schedule)


def draw(prediction_type: str, kind: str, num: int = 5, **changes) -> torch.Tensor:
    schedule = schedule_of(kind)
    settings = {
        "labels": torch.arange(num) % 2,
        "noise": sampling.evaluation_noise(7, num, SHAPE),
        "nfe": 8,
        "solver": "euler",
        "batch_size": 2,
        "null_class": 2,
        **changes,
    }
    network = settings.pop("network", None)
    network = network or knowing_x0(class_images(), schedule, prediction_type)
    return sampling.generate(network, schedule, prediction_type, **settings)


@pytest.mark.parametrize("solver", ["euler", "dpm", "unipc", "rk4"])
@pytest.mark.parametrize(("prediction_type", "kind"), PATHS)
def test_a_network_that_knows_the_image_of_each_class_gives_it(prediction_type, kind, solver):
    samples = draw(prediction_type, kind, solver=solver)
    expected = class_images()[torch.arange(5) % 2]
    torch.testing.assert_close(samples, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("solver", "guidance", "per_sample"),
    [("euler", 1.0, 8), ("dpm", 1.0, 8), ("unipc", 2.0, 8), ("rk4", 1.0, 5), ("rk4", 3.0, 2)],
)
def test_evaluations_are_counted_with_guidance_and_stages(solver, guidance, per_sample):
    meter = ComputeMeter()
    draw("flow_matching", "flow", solver=solver, guidance_scale=guidance, meter=meter)
    assert meter.evaluation == 5 * per_sample
    assert meter.forward_equivalents == 0
    steps = sampling.num_steps(8, solver, guidance)
    assert sampling.num_evaluations(steps, solver, guidance) == per_sample


def test_steps_are_rounded_down_and_never_fewer_than_one():
    assert sampling.num_steps(10, "euler") == 10
    assert sampling.num_steps(5, "euler", guidance_scale=2.0) == 2
    assert sampling.num_steps(1, "euler", guidance_scale=2.0) == 1
    # A step of rk4 costs four evaluations, the last one a single one.
    assert [sampling.num_steps(nfe, "rk4") for nfe in (1, 4, 5, 8, 9, 10)] == [1, 1, 2, 2, 3, 3]
    assert sampling.num_steps(10, "rk4", guidance_scale=0.0) == 2


def test_guidance_extrapolates_from_the_null_class():
    # The null class is grey (0), so guidance by 1.5 gives 1.5 times the image of the class.
    plain = class_images()[torch.arange(5) % 2]
    guided = draw("sample", "linear", guidance_scale=1.5)
    torch.testing.assert_close(guided, 1.5 * plain, rtol=0, atol=1e-5)
    unconditional = draw("sample", "linear", guidance_scale=0.0)
    torch.testing.assert_close(unconditional, torch.zeros_like(plain), rtol=0, atol=1e-5)


def test_samples_do_not_depend_on_the_batch_size():
    def contracting(*, sample, timestep, class_labels):
        return sample.tanh() + class_labels[:, None, None, None]

    whole = draw("flow_matching", "flow", network=contracting, batch_size=5)
    single = draw("flow_matching", "flow", network=contracting, batch_size=1)
    torch.testing.assert_close(whole, single)


def test_samples_stay_within_the_pixel_range():
    def away(*, sample, timestep, class_labels):
        return torch.full_like(sample, -50.0)

    samples = draw("flow_matching", "flow", network=away)
    assert torch.equal(samples, torch.ones_like(samples))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_a_diverged_network_gives_nan_instead_of_a_white_image(value):
    def broken(*, sample, timestep, class_labels):
        wrong = (class_labels == 1)[:, None, None, None]
        return torch.where(wrong, sample.abs() * value * 10, sample)

    samples = draw("flow_matching", "flow", network=broken)
    assert bool(samples[1::2].isnan().any(-1).any(-1).all())
    assert bool(samples[0::2].isfinite().all())


def test_epsilon_scaling_by_one_changes_nothing_and_by_more_shrinks_the_noise():
    plain = draw("epsilon", "linear", nfe=4)
    torch.testing.assert_close(draw("epsilon", "linear", nfe=4, epsilon_scaling=1.0), plain)
    assert not torch.allclose(draw("epsilon", "linear", nfe=4, epsilon_scaling=1.1), plain)


def test_more_steps_than_a_ddpm_schedule_has_indices_are_cut_to_them():
    config = RunConfig.model_validate(
        {"prediction_type": "epsilon", "noise_schedule": {"num_train_timesteps": 4}}
    )
    schedule = NoiseSchedule.from_config(config.noise_schedule)
    assert sampling.sampling_nodes(schedule, 9).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_the_first_noise_is_the_same_for_any_number_of_samples():
    few, many = (sampling.evaluation_noise(3, num, SHAPE) for num in (4, 9))
    assert torch.equal(few, many[:4])
    assert not torch.equal(few, sampling.evaluation_noise(4, 4, SHAPE))
    assert sampling.balanced_labels(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_the_mode_of_every_module_is_put_back_even_after_an_error():
    class Failing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = torch.nn.Dropout().eval()
            self.active = torch.nn.Dropout()

        def forward(self, *, sample, timestep, class_labels):
            assert not self.active.training
            raise RuntimeError("out of memory")

    network = Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        draw("flow_matching", "flow", network=network)
    assert (network.training, network.active.training, network.frozen.training) == (
        True,
        True,
        False,
    )
