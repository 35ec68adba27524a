"""The sections of a run that stand by themselves, and what all sections have in common.

Every field carries its description, range and default; the JSON schema for editors is made from
them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_matching"]
ScheduleKind = Literal["flow", "linear", "scaled_linear", "cosine"]
SolverName = Literal["unipc", "euler", "dpm", "rk4"]
QualityMetric = Literal["kid", "energy_distance", "sliced_wasserstein", "frechet_distance"]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
# Integers stay below 2^53, so that JSON, tensors and databases carry them unchanged.
LARGEST_INT = 2**53
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST_INT)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
# YAML and JSON have lists only; the elements stay strictly checked.
IntTuple = Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)]


class Section(BaseModel):
    """Common behaviour of all sections: frozen, strict, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False
    )


class DataConfig(Section):
    """Where the images come from and how they are split."""

    source: Literal["digits", "fashion_mnist", "image_folder"] = Field(
        "digits", description="digits (8x8, built in), fashion_mnist (28x28) or image_folder."
    )
    path: str | None = Field(
        None, description="Folder of the images (image_folder) or of the IDX files."
    )
    image_size: int | None = Field(
        None, ge=4, le=1024, description="Edge in pixels; default: the source's own (folder: 32)."
    )
    grayscale: bool = Field(False, description="Convert the images of a folder to one channel.")
    limit: int | None = Field(
        None,
        ge=4,
        le=LARGEST_INT,
        description="Use only so many images (before the split); default: all.",
    )
    holdout_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.2, description="Share of the images kept from training, the reference of quality."
    )
    split_seed: NonNegativeInt = Field(0, description="Seed of the held-out split.")
    cache_dir: str | None = Field(
        None, description="Folder of the decoded Parquet cache; default: ~/.cache/raysched."
    )


class ModelConfig(Section):
    """The network: a UNet or a DiT from diffusers, class-conditional, with EMA weights."""

    kind: Literal["unet", "dit"] = Field("unet", description="UNet2DModel or a small DiT.")
    block_out_channels: IntTuple = Field((16, 32), description="UNet: channels per resolution.")
    layers_per_block: PositiveInt = Field(1, description="UNet: residual layers per block.")
    attention: bool = Field(False, description="UNet: self-attention at the lowest resolution.")
    norm_num_groups: PositiveInt = Field(8, description="UNet: groups of the group norm.")
    num_layers: PositiveInt = Field(4, description="DiT: transformer blocks.")
    num_attention_heads: PositiveInt = Field(4, description="DiT: attention heads.")
    attention_head_dim: PositiveInt = Field(16, description="DiT: width of a head.")
    patch_size: PositiveInt = Field(2, description="DiT: edge of a patch in pixels.")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Dropout rate.")
    class_conditional: bool = Field(True, description="Feed the class label to the network.")
    label_dropout: Fraction = Field(
        0.1, description="Chance that a label is replaced by the null class (for guidance)."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass: slower, less memory."
    )
    ema_half_life_samples: PositiveFloat = Field(
        2000.0, description="Training samples after which a weight's share in the EMA has halved."
    )


class NoiseScheduleConfig(Section):
    """x_t = alpha(t) x0 + sigma(t) eps."""

    kind: ScheduleKind = Field(
        "flow", description="flow (linear path) or a DDPM schedule: linear, scaled_linear, cosine."
    )
    num_train_timesteps: Annotated[int, Field(ge=2, le=100_000)] = Field(
        1000, description="T: indices of a DDPM schedule; the finest rollout grid."
    )
    beta_start: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        1e-4, description="First beta of linear and scaled_linear."
    )
    beta_end: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.02, description="Last beta of linear and scaled_linear."
    )
    shift: PositiveFloat = Field(1.0, description="Flow: t = s u / (1 + (s - 1) u).")
    timestep_sampling: Literal["uniform", "logit_normal"] = Field(
        "uniform", description="Distribution of the training time u."
    )


class OptimizerConfig(Section):
    """AdamW, its schedule over the fraction of the budget spent, and clipping."""

    learning_rate: PositiveFloat = Field(2e-3, description="Peak learning rate.")
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW's decoupled decay.")
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.9, description="First moment.")
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.99, description="Second moment.")
    eps: PositiveFloat = Field(1e-8, description="Denominator's floor.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Learning rate against the fraction of the budget spent."
    )
    warmup_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.03, description="Fraction of the budget over which the rate rises from 0."
    )
    max_grad_norm: PositiveFloat | None = Field(1.0, description="Clip the gradient; null: never.")


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = Field(True, description="Log to MLflow.")
    uri: str | None = Field(
        None, description="Tracking URI; default: $MLFLOW_TRACKING_URI, else runs/mlflow.db."
    )
    experiment: Annotated[str, Field(min_length=1)] = Field(
        "raysched", description="Experiment's name."
    )


class ScalingConfig(Section):
    """What Ray gives a run."""

    num_workers: Annotated[int, Field(ge=0, le=4096)] = Field(
        1, description="Ray Train workers; 0: in this process, without Ray."
    )
    cpus_per_worker: PositiveInt = Field(1, description="CPUs, and torch threads, per worker.")
    use_gpu: bool = Field(False, description="One GPU per worker.")
    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="What the workers hold: ddp, all weights each; fsdp, each a part (FSDP2).",
    )
    max_failures: NonNegativeInt = Field(
        2, description="Lost workers survived, each time from the last checkpoint."
    )
    hang_timeout_s: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] | None = Field(
        600.0,
        description="Seconds without progress after which workers count as hung, and are started "
        "again, and an evaluation beside the training is ended and made by a worker; longer than "
        "the metrics of an evaluation take. null: never.",
    )
    resource_timeout_s: NonNegativeFloat | None = Field(
        60.0,
        description="Seconds to wait for CPUs and GPUs that are busy, or that the cluster may "
        "still add; 0: refuse at once; null: as long as it takes, as the trials of a sweep do.",
    )
    grace_s: PositiveFloat | None = Field(
        25.0,
        description="Seconds after SIGTERM in which the checkpoint must be written; then the "
        "command ends without it. null: as long as it takes.",
    )
    peak_tflops: PositiveFloat | None = Field(
        None,
        description="TFLOP/s of a worker's device at the run's precision, for model FLOPs "
        "utilisation; default: known for common GPUs, else the utilisation is left out.",
    )
    retry_out_of_memory: bool = Field(
        False,
        description="After running out of memory, go on at half the micro-batch and twice the "
        "gradient accumulation: the same global batch.",
    )
