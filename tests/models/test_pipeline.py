import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from raysched.config.run import RunConfig
from raysched.diffusion.schedules import NoiseSchedule
from raysched.errors import ConfigError, StorageError
from raysched.evaluation.sampling import evaluation_noise, generate
from raysched.models.ema import EMA
from raysched.models.export import build_pipeline, build_scheduler, load_network, save_pipeline
from raysched.models.networks import build_network
from raysched.models.weights import weights_sha256

# diffusers hands tensors to numpy in a way that numpy 2 complains about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NAMES = tuple("abcd")
DATA_STD = 0.4
SMALL_MODELS = {
    "unet": {"kind": "unet", "block_out_channels": (8, 16)},
    "dit": {"kind": "dit", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8},
    "unconditional unet": {"block_out_channels": (8, 16), "class_conditional": False},
    "unconditional dit": {"kind": "dit", "num_layers": 1, "class_conditional": False},
}
COMBINATIONS = [
    ("flow", "flow_matching"),
    ("flow", "v_prediction"),
    ("flow", "sample"),
    ("flow", "epsilon"),
    *(
        (kind, prediction)
        for kind in ("linear", "scaled_linear", "cosine")
        for prediction in ("epsilon", "v_prediction", "sample")
    ),
]


def run_config(kind="flow", prediction="flow_matching", model="unet", shift=1.0):
    return RunConfig(
        prediction_type=prediction,
        noise_schedule={"kind": kind, "shift": shift},
        model=SMALL_MODELS[model],
    )


def live_network(config):
    """A network with random weights everywhere, also where it would start at zero."""
    network = build_network(config.model, 1, 8, len(NAMES), seed=1).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return network


class GaussianBackbone(nn.Module):
    """The exact denoiser of data ~ N(mean of the class, DATA_STD^2), in any prediction type."""

    def __init__(self, schedule, prediction):
        super().__init__()
        self.schedule, self.prediction = schedule, prediction
        self.config = SimpleNamespace(in_channels=1, sample_size=8)
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, sample, timestep, class_labels, return_dict=False):
        if self.schedule.is_flow:
            sigma = timestep.double() / 1000.0
            alpha = 1 - sigma
        else:
            alpha, sigma = self.schedule.table[:, timestep.round().long() + 1]
        alpha, sigma = alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)
        x, mean = sample.double(), (class_labels.double() * 0.2 - 0.3).reshape(-1, 1, 1, 1)
        variance = alpha**2 * DATA_STD**2 + sigma**2
        eps = sigma * (x - alpha * mean) / variance
        x0 = mean + alpha * DATA_STD**2 * (x - alpha * mean) / variance
        outputs = {
            "epsilon": eps,
            "sample": x0,
            "flow_matching": eps - x0,
            "v_prediction": alpha * eps - sigma * x0,
        }
        return (outputs[self.prediction].float(),)


@pytest.mark.parametrize("num_steps", [1, 7, 16])
@pytest.mark.parametrize(("kind", "prediction"), COMBINATIONS)
def test_the_exact_denoisers_images_equal_those_of_our_own_euler(kind, prediction, num_steps):
    config = run_config(kind, prediction, shift=1.7)
    schedule = NoiseSchedule.from_config(config.noise_schedule)
    backbone = GaussianBackbone(schedule, prediction)
    noise, labels = evaluation_noise(3, 8, (1, 8, 8)), torch.arange(8) % len(NAMES)

    def network(*, sample, timestep, class_labels):
        return backbone(sample, timestep, class_labels)[0]

    own = generate(
        network,
        schedule,
        prediction,
        labels=labels,
        noise=noise,
        nfe=num_steps,
        solver="euler",
        batch_size=8,
        null_class=len(NAMES),
    )
    pipeline = build_pipeline(SimpleNamespace(backbone=backbone), config, NAMES)
    images = pipeline(
        class_labels=labels, latents=noise, num_inference_steps=num_steps, output_type="pt"
    ).images
    assert (own.abs() < 1.0).double().mean() > 0.5
    # cosine has alpha = 5e-5 at the start, where x0 from an epsilon model is 20,000 roundings off.
    tolerance = 2e-2 if (kind, prediction) == ("cosine", "epsilon") else 1e-4
    torch.testing.assert_close(images * 2 - 1, own, rtol=0, atol=tolerance)


@pytest.mark.parametrize("model", SMALL_MODELS)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize(("kind", "prediction"), [("flow", "flow_matching"), ("linear", "sample")])
def test_a_networks_images_equal_those_of_our_own_euler(model, guidance, kind, prediction):
    config = run_config(kind, prediction, model)
    network = live_network(config)
    noise, labels = evaluation_noise(3, 5, (1, 8, 8)), torch.arange(5) % len(NAMES)
    own = generate(
        network,
        NoiseSchedule.from_config(config.noise_schedule),
        prediction,
        labels=labels,
        noise=noise,
        nfe=6 if guidance == 1.0 else 12,
        solver="euler",
        batch_size=5,
        null_class=len(NAMES),
        guidance_scale=guidance,
    )
    images = build_pipeline(network, config, NAMES)(
        class_labels=labels,
        latents=noise,
        num_inference_steps=6,
        guidance_scale=guidance,
        output_type="pt",
    ).images
    torch.testing.assert_close(images * 2 - 1, own, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model", SMALL_MODELS)
def test_a_saved_folder_gives_back_network_and_images(tmp_path, model):
    from raysched.models.pipeline import ClassPipeline

    config = run_config(model=model)
    network = live_network(config)
    save_pipeline(tmp_path / "pipeline", network, config, NAMES)
    loaded = load_network(tmp_path / "pipeline")
    assert weights_sha256(loaded.state_dict()) == weights_sha256(network.state_dict())
    assert loaded.null_class == network.null_class
    assert not loaded.training
    pipeline = ClassPipeline.from_pretrained(str(tmp_path / "pipeline"))
    pipeline.set_progress_bar_config(disable=True)
    given = {"latents": evaluation_noise(0, 4, (1, 8, 8)), "output_type": "pt"}
    expected = build_pipeline(network, config, NAMES)(**given).images
    assert torch.equal(pipeline(**given).images, expected)
    assert not list(tmp_path.rglob("*.bin"))
    assert list(tmp_path.rglob("*.safetensors"))


FRESH_PROGRAM = """
import json, sys
sys.modules["raysched"] = None  # an import of it would fail
import torch
from diffusers import DiffusionPipeline, UNet2DModel

folder = sys.argv[1]
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
noise = torch.load(sys.argv[2])
images = pipeline(class_labels=["b", 3], latents=noise, num_inference_steps=4, output_type="np")
drawn = pipeline(class_labels="c", num_images=3, generator=torch.Generator().manual_seed(0))
unet = UNet2DModel.from_pretrained(folder + "/unet")
print(json.dumps({
    "images": images.images.tolist(),
    "size": drawn.images[0].size,
    "labels": drawn.class_labels,
    "parameters": sum(p.numel() for p in unet.parameters()),
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "prediction"), [("flow", "flow_matching"), ("cosine", "sample")])
def test_a_fresh_process_without_raysched_loads_and_runs_the_folder(tmp_path, kind, prediction):
    config = run_config(kind, prediction)
    network = live_network(config)
    save_pipeline(tmp_path / "pipeline", network, config, NAMES)
    noise = evaluation_noise(5, 2, (1, 8, 8))
    torch.save(noise, tmp_path / "noise.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROGRAM, tmp_path / "pipeline", tmp_path / "noise.pt"],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env={"HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
    )
    found = json.loads(done.stdout)
    expected = build_pipeline(network, config, NAMES)(
        class_labels=[1, 3], latents=noise, num_inference_steps=4, output_type="np"
    ).images
    np.testing.assert_allclose(np.array(found["images"]), expected, rtol=0, atol=1e-5)
    assert found["size"] == [8, 8]
    assert found["labels"] == [2, 2, 2]
    assert found["parameters"] == sum(p.numel() for p in network.parameters())


def test_the_averaged_weights_are_saved_inside_applied(tmp_path):
    config = run_config()
    network = live_network(config)
    ema = EMA(network, 100.0)
    averaged = weights_sha256(network.state_dict())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    with ema.applied(network):
        save_pipeline(tmp_path / "pipeline", network, config, NAMES)
    assert weights_sha256(load_network(tmp_path / "pipeline").state_dict()) == averaged


def test_saving_again_replaces_the_folder(tmp_path):
    for model in ("unet", "dit"):
        config = run_config(model=model)
        save_pipeline(tmp_path / "pipeline", live_network(config), config, NAMES)
    assert (tmp_path / "pipeline" / "transformer").is_dir()
    assert not (tmp_path / "pipeline" / "unet").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_labels_are_numbers_names_or_the_classes_in_turn():
    config = run_config()
    pipeline = build_pipeline(live_network(config), config, NAMES)
    assert pipeline.resolve_labels(["c", 0, "d"], None) == [2, 0, 3]
    assert pipeline.resolve_labels(1, 3) == [1, 1, 1]
    assert pipeline.resolve_labels(torch.tensor([3, 2]), None) == [3, 2]
    assert pipeline.resolve_labels(None, 6) == [0, 1, 2, 3, 0, 1]
    assert pipeline.resolve_labels(None, None) == [0, 1, 2, 3]
    for wrong in ("e", 4, -1, 1.5):
        with pytest.raises(ValueError, match="is no class"):
            pipeline.resolve_labels([wrong], None)
    with pytest.raises(ValueError, match="2 labels for 3 images"):
        pipeline.resolve_labels([0, 1], 3)


def test_wrong_arguments_are_messages():
    config = run_config("linear", "epsilon")
    pipeline = build_pipeline(live_network(config), config, NAMES)
    with pytest.raises(ValueError, match="num_inference_steps: must be at least 1, got 0"):
        pipeline(num_inference_steps=0)
    with pytest.raises(ValueError, match="num_inference_steps: at most 1000"):
        pipeline(num_inference_steps=1001)
    with pytest.raises(ValueError, match="output_type"):
        pipeline(output_type="jpeg")
    with pytest.raises(ValueError, match=r"latents: must have shape \(1, 1, 8, 8\)"):
        pipeline(class_labels=0, latents=torch.zeros(1, 3, 8, 8))


def test_generators_and_output_types():
    config = run_config()
    pipeline = build_pipeline(live_network(config), config, NAMES)
    first, second = (
        pipeline(generator=torch.Generator().manual_seed(3), output_type="pt").images
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert first.shape == (4, 1, 8, 8)
    assert 0.0 <= first.min() <= first.max() <= 1.0
    (pictures,) = pipeline(generator=torch.Generator().manual_seed(3), return_dict=False)
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    np.testing.assert_allclose(pixels / 255.0, first[:, 0].numpy(), atol=0.5 / 255 + 1e-6)


def test_another_scheduler_can_take_over():
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    config = run_config("scaled_linear", "v_prediction")
    pipeline = build_pipeline(live_network(config), config, NAMES)
    given = {"latents": evaluation_noise(0, 4, (1, 8, 8)), "output_type": "pt"}
    expected = pipeline(**given, num_inference_steps=10).images
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    # 10 divides T, so DDIM walks the same nodes.
    images = pipeline(**given, num_inference_steps=10).images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_the_saved_scheduler_has_the_runs_noise_levels(kind):
    config = run_config(kind, "v_prediction")
    scheduler = build_scheduler(config.noise_schedule, "v_prediction")
    table = NoiseSchedule.from_config(config.noise_schedule).table
    torch.testing.assert_close(
        scheduler.alphas_cumprod.double().sqrt(), table[0, 1:], rtol=2e-4, atol=1e-6
    )


def test_flow_matching_on_a_ddpm_schedule_is_refused():
    config = run_config("linear", "epsilon")
    with pytest.raises(ConfigError, match=r"needs noise_schedule\.kind: flow, got linear"):
        build_scheduler(config.noise_schedule, "flow_matching")


def test_a_folder_without_a_pipeline_is_a_message(tmp_path):
    with pytest.raises(StorageError, match="holds no usable pipeline"):
        load_network(tmp_path)
    config = run_config()
    save_pipeline(tmp_path / "p", live_network(config), config, NAMES)
    (weights,) = (tmp_path / "p").rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(StorageError, match="holds no usable pipeline"):
        load_network(tmp_path / "p")


def test_a_place_that_cannot_be_written_is_a_message(tmp_path):
    (tmp_path / "file").write_text("x")
    config = run_config()
    with pytest.raises(StorageError, match="can't write the pipeline"):
        save_pipeline(tmp_path / "file" / "pipeline", live_network(config), config, NAMES)
