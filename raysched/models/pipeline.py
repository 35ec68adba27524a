"""A diffusers pipeline that draws images of given classes; needs torch and diffusers only.

A copy of this file lies in every saved pipeline folder, so that the folder works on a machine
where raysched isn't installed:

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("runs/NAME/pipeline", trust_remote_code=True)
    images = pipe(class_labels=[3, 3, 8], num_inference_steps=10).images

`trust_remote_code` lets diffusers run the folder's own `pipeline.py`. With raysched installed,
`ClassPipeline.from_pretrained("runs/NAME/pipeline")` does the same without it.
B images, C channels, H = W pixels; t in [0, 1] with 0 = data.
"""

import inspect
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

# At the noisy end of a flow path, where alpha is 0 up to rounding, an epsilon model says nothing
# about x0, which counts as 0 there, the mean of [-1, 1].
ALPHA_FLOOR = 1e-6


@dataclass
class ClassPipelineOutput(BaseOutput):  # type: ignore[misc]
    """Result of a call.

    Attributes:
        images: PIL images, (B, H, W, C) float array in [0, 1], or (B, C, H, W) tensor in [0, 1].
        class_labels: the class of each image.
    """

    images: Any
    class_labels: list[int]


class ClassPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draws images of given classes from noise.

    Args:
        scheduler: walks from noise to data; `FlowMatchEulerDiscreteScheduler` on a flow path,
            else a DDPM one. As saved, both are Euler's method (DDIM) on the nodes j/N.
        unet: the network, if it is a UNet.
        transformer: the network, if it is a DiT.
        prediction_type: epsilon, v_prediction, sample or flow_matching.
        class_names: one name per class of the data.
        class_conditional: whether the network listens to class labels.
    """

    _optional_components = ["unet", "transformer"]  # noqa: RUF012  diffusers' own convention

    def __init__(
        self,
        scheduler: SchedulerMixin,
        unet: UNet2DModel | None = None,
        transformer: DiTTransformer2DModel | None = None,
        prediction_type: str = "flow_matching",
        class_names: list[str] | None = None,
        class_conditional: bool = True,
    ) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer)
        self.register_to_config(
            prediction_type=prediction_type,
            class_names=list(class_names or ["image"]),
            class_conditional=class_conditional,
        )

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Read the folder's config; this class needs none of the folder's own code."""
        config = super().load_config(*args, **kwargs)
        settings = config[0] if isinstance(config, tuple) else config
        if isinstance(settings.get("_class_name"), (list, tuple)):
            settings["_class_name"] = cls.__name__
        return config

    @property
    def network(self) -> Any:
        """The UNet or the DiT."""
        return self.unet if self.unet is not None else self.transformer

    @property
    def is_flow(self) -> bool:
        """Whether the scheduler walks the linear path of flow matching."""
        return hasattr(self.scheduler, "scale_noise")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.Tensor | None = None,
        num_images: int | None = None,
        num_inference_steps: int = 10,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw images.

        Args:
            class_labels: numbers or names of classes, one per image; a single one is repeated.
                Default: the classes in turn.
            num_images: B; default: one per label, or one of each class.
            num_inference_steps: steps from noise to data.
            guidance_scale: classifier-free guidance; 1 is off, else two network calls a step.
            generator: of the noise.
            latents: (B, C, H, W), the noise itself.
            output_type: "pil", "np" or "pt".
            return_dict: False: return a tuple of the images.

        Returns:
            `ClassPipelineOutput`.

        Raises:
            ValueError: an unknown class, or counts that don't match.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type: must be pil, np or pt, got {output_type!r}")
        if latents is not None and num_images is None:
            num_images = len(latents)
        labels = self.resolve_labels(class_labels, num_images)
        sample = self.initial_noise(len(labels), generator, latents)
        self.set_nodes(num_inference_steps)
        sample = sample * self.scheduler_scale()
        label_tensor = torch.tensor(labels, dtype=torch.int64, device=sample.device)
        for time in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scaled_input(sample, time)
            output = self.predict(scaled, time, label_tensor, guidance_scale)
            output = self.as_scheduler_output(output, sample, time)
            sample = self.scheduler.step(output, time, sample, return_dict=False)[0]
        images = self.finish(sample, output_type)
        return ClassPipelineOutput(images, labels) if return_dict else (images,)

    def initial_noise(
        self,
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """The given noise, or a fresh draw: (B, C, H, W) in fp32 on the network's device."""
        edge = self.network.config.sample_size
        shape = (num_images, self.network.config.in_channels, edge, edge)
        if latents is None:
            noise = randn_tensor(shape, generator, self._execution_device, torch.float32)
            return cast(torch.Tensor, noise)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents: must have shape {shape}, got {tuple(latents.shape)}")
        return latents.to(self._execution_device, torch.float32)

    def resolve_labels(self, class_labels: Any, num_images: int | None) -> list[int]:
        """Class numbers of the images, from names, numbers or nothing."""
        names = self.config.class_names
        if class_labels is None:
            count = len(names) if num_images is None else num_images
            return [number % len(names) for number in range(count)]
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, (int, str)):
            class_labels = [class_labels]
        labels = []
        for label in class_labels:
            number = names.index(label) if label in names else label
            if not isinstance(number, int) or not 0 <= number < len(names):
                raise ValueError(
                    f"class_labels: {label!r} is no class; classes: 0..{len(names) - 1} or "
                    f"{', '.join(names)}"
                )
            labels.append(number)
        if num_images is not None and len(labels) == 1:
            labels = labels * num_images
        if num_images is not None and len(labels) != num_images:
            raise ValueError(
                f"class_labels: {len(labels)} labels for {num_images} images; give one per image"
            )
        return labels

    def set_nodes(self, num_steps: int) -> None:
        """Let the scheduler walk j/N of the path, j = N..1, and then to the data."""
        if num_steps < 1:
            raise ValueError(f"num_inference_steps: must be at least 1, got {num_steps}")
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        device = self._execution_device
        if self.is_flow and "sigmas" in accepted:
            # The scheduler applies its own shift to these.
            sigmas = [j / num_steps for j in range(num_steps, 0, -1)]
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        elif not self.is_flow and "timesteps" in accepted:
            total = self.scheduler.config.num_train_timesteps
            if num_steps > total:
                raise ValueError(
                    f"num_inference_steps: at most {total} for this model, got {num_steps}"
                )
            # round(j T / N) - 1 in integers, halves upwards.
            indices = [
                (2 * j * total + num_steps) // (2 * num_steps) - 1 for j in range(num_steps, 0, -1)
            ]
            self.scheduler.set_timesteps(timesteps=indices, device=device)
        else:
            self.scheduler.set_timesteps(num_steps, device=device)

    def scheduler_scale(self) -> float:
        """Standard deviation of the noise that the scheduler starts from."""
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def scaled_input(self, sample: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The sample in the network's scale, for schedulers that keep another one."""
        if hasattr(self.scheduler, "scale_model_input"):
            return cast(torch.Tensor, self.scheduler.scale_model_input(sample, time))
        return sample

    def predict(
        self, sample: torch.Tensor, time: torch.Tensor, labels: torch.Tensor, guidance: float
    ) -> torch.Tensor:
        """The network's prediction (B, C, H, W) in fp32, with guidance where asked."""
        conditional = self.call_network(sample, time, labels)
        if guidance == 1.0 or not self.config.class_conditional:
            return conditional
        null = torch.full_like(labels, len(self.config.class_names))
        unconditional = self.call_network(sample, time, null)
        return unconditional + guidance * (conditional - unconditional)

    def call_network(
        self, sample: torch.Tensor, time: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """One evaluation of the network in its own precision; the result in fp32."""
        given: torch.Tensor | None = labels
        if not self.config.class_conditional:
            # The DiT's adaptive norm always wants a label: its only one.
            given = None if self.unet is not None else torch.zeros_like(labels)
        times = time.to(device=sample.device, dtype=torch.float32).expand(len(sample))
        output = self.network(
            sample.to(self.network.dtype), timestep=times, class_labels=given, return_dict=False
        )
        return cast(torch.Tensor, output[0].float())

    def as_scheduler_output(
        self, output: torch.Tensor, sample: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """What the scheduler expects: on a flow path the velocity, else the output itself."""
        kind: str = self.config.prediction_type
        if not self.is_flow or kind == "flow_matching":
            return output
        sigma: float = float(time) / self.scheduler.config.num_train_timesteps
        alpha = 1.0 - sigma
        if kind == "sample":
            return (sample - output) / sigma
        if kind == "epsilon":
            return output if alpha < ALPHA_FLOOR else (output - sample) / alpha
        # v = alpha eps - sigma x0, and a flow path's alpha^2 + sigma^2 isn't 1.
        return ((alpha + sigma) * output + (sigma - alpha) * sample) / (alpha**2 + sigma**2)

    def finish(self, sample: torch.Tensor, output_type: str) -> Any:
        """Map [-1, 1] to images of the asked type."""
        unit = (sample / 2 + 0.5).clamp(0.0, 1.0)
        if output_type == "pt":
            return unit
        array = unit.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return array
        return self.numpy_to_pil(np.asarray(array))
