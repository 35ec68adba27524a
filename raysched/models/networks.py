"""The denoising networks: diffusers' UNet and DiT behind one call.

A `Denoiser` takes float timesteps of any value (fractional ones too), draws nothing by itself
except dropout, and has one class beyond the data's: the null class, which stands for "no label".
Dimensions: B batch, C channels, H = W = image_size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from raysched.config.run import ModelConfig
from raysched.errors import ConfigError

UNET_HEAD_DIM = 8


class Denoiser(nn.Module):
    """A diffusers backbone with the calling convention that all rooms share.

    Args:
        backbone: `UNet2DModel` or `DiTTransformer2DModel`.
        num_classes: classes of the data; `num_classes` itself is the null class.
        class_conditional: False: labels are accepted and ignored.
    """

    def __init__(self, backbone: nn.Module, *, num_classes: int, class_conditional: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.class_conditional = class_conditional
        self._is_unet = hasattr(backbone, "conv_in")
        self._is_compiled = False

    @property
    def null_class(self) -> int:
        """The label that means "no label"."""
        return self.num_classes

    def compile_backbone(self, options: dict[str, Any] | None = None) -> None:
        """Compile the backbone in place, for any number of rows; names of weights stay.

        Args:
            options: of torch's compiler.
        """
        self.backbone.compile(options=options)
        self._is_compiled = True

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """Predict, in whatever the prediction type says, at every sample's own time.

        Args:
            sample: (B, C, H, W), noisy images.
            timestep: (B,) float: DDPM index, or 1000 t on a flow path; may be fractional.
            class_labels: (B,) int64 in 0..num_classes; None: the null class for all.

        Returns:
            (B, C, H, W), the raw prediction.
        """
        labels = self._labels(class_labels, sample)
        # The sinusoidal embedding needs fp32: bf16 can't tell 998 from 1000.
        time = timestep.to(device=sample.device, dtype=torch.float32)
        if self._is_compiled:
            # The rows alone: with all dimensions dynamic, inductor's gradients came out wrong.
            for given in (sample, time, labels):
                if given is not None:
                    torch._dynamo.maybe_mark_dynamic(given, 0)
        output = self.backbone(sample, timestep=time, class_labels=labels, return_dict=False)
        return cast(Tensor, output[0])

    def _labels(self, class_labels: Tensor | None, sample: Tensor) -> Tensor | None:
        if self.class_conditional:
            if class_labels is None:
                return torch.full(
                    (sample.shape[0],), self.null_class, dtype=torch.int64, device=sample.device
                )
            return class_labels
        if self._is_unet:
            return None
        # The DiT's adaptive norm always wants a label: an unconditional one has a single class.
        return torch.zeros(sample.shape[0], dtype=torch.int64, device=sample.device)


def build_network(
    config: ModelConfig, channels: int, image_size: int, num_classes: int, seed: int = 0
) -> Denoiser:
    """Build the network of a run; the same arguments give the same weights.

    Args:
        config: the run's `model` section.
        channels: C of the images.
        image_size: H = W of the images, in pixels.
        num_classes: classes of the data, without the null class.
        seed: of the initial weights; the global random state is left as it was.

    Raises:
        ConfigError: the architecture doesn't fit the image size.
    """
    check_architecture(config, image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build = _build_unet if config.kind == "unet" else _build_dit
        backbone = build(config, channels, image_size, num_classes)
    return wrap_backbone(backbone, num_classes, config.class_conditional)


def wrap_backbone(backbone: nn.Module, num_classes: int, class_conditional: bool) -> Denoiser:
    """Wrap a diffusers model, new or loaded, so that it never drops labels by its own draws."""
    for module in backbone.modules():
        # DiT's label embedding replaces labels in train mode from the global random state.
        if type(module).__name__ == "LabelEmbedding":
            cast(Any, module).dropout_prob = 0.0
    return Denoiser(backbone, num_classes=num_classes, class_conditional=class_conditional)


def check_architecture(config: ModelConfig, image_size: int) -> None:
    """Raise one `ConfigError` with everything about the network that can't work."""
    problems = (
        _unet_problems(config, image_size)
        if config.kind == "unet"
        else _dit_problems(config, image_size)
    )
    if problems:
        raise ConfigError(problems)


def _unet_problems(config: ModelConfig, image_size: int) -> list[str]:
    problems = []
    levels, groups = len(config.block_out_channels), config.norm_num_groups
    sizes = [image_size]
    while len(sizes) < levels and sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    if len(sizes) < levels:
        walk = " -> ".join(str(size) for size in sizes)
        problems.append(
            f"model.block_out_channels: {levels} levels halve the image {levels - 1} times, but "
            f"images of {image_size} pixels go {walk} and then no further; use at most "
            f"{len(sizes)} levels, or set data.image_size to a multiple of {2 ** (levels - 1)}"
        )
    wrong = [channels for channels in config.block_out_channels if channels % groups]
    if wrong:
        problems.append(
            f"model.block_out_channels: must be multiples of model.norm_num_groups = {groups}, "
            f"got {', '.join(map(str, wrong))}"
        )
    return problems


def _dit_problems(config: ModelConfig, image_size: int) -> list[str]:
    problems = []
    if image_size % config.patch_size:
        fitting = [p for p in range(1, image_size + 1) if image_size % p == 0]
        problems.append(
            f"model.patch_size: must divide the image size of {image_size} pixels, got "
            f"{config.patch_size}; possible: {', '.join(map(str, fitting))}"
        )
    width = config.num_attention_heads * config.attention_head_dim
    if width % 4:
        # Position embeddings: sine and cosine for each of the two axes.
        problems.append(
            "model.attention_head_dim: num_attention_heads * attention_head_dim must be a "
            f"multiple of 4, got {width}"
        )
    return problems


def _build_unet(
    config: ModelConfig, channels: int, image_size: int, num_classes: int
) -> nn.Module:
    from diffusers.models.unets.unet_2d import UNet2DModel

    levels = len(config.block_out_channels)
    lowest = "Attn" if config.attention else ""
    model = UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        down_block_types=("DownBlock2D",) * (levels - 1) + (f"{lowest}DownBlock2D",),
        up_block_types=(f"{lowest}UpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        add_attention=config.attention,
        attention_head_dim=min(UNET_HEAD_DIM, *config.block_out_channels),
        norm_num_groups=config.norm_num_groups,
        dropout=config.dropout,
        num_class_embeds=num_classes + 1 if config.class_conditional else None,
    )
    return cast(nn.Module, model)


def _build_dit(config: ModelConfig, channels: int, image_size: int, num_classes: int) -> nn.Module:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=channels,
        num_layers=config.num_layers,
        dropout=config.dropout,
        sample_size=image_size,
        patch_size=config.patch_size,
        # diffusers itself adds the null class behind these.
        num_embeds_ada_norm=num_classes if config.class_conditional else 1,
    )
    return cast(nn.Module, model)
