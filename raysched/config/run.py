"""What one training run is: a frozen pydantic model with one section per subject.

Every field carries its description, range and default; the JSON schema for editors is made from
them. Values that depend on others (`prediction_type`, the schedule's kind, the rollout grid,
`reflexflow: auto`) are resolved while validating, so that code that reads a config never guesses.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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


class ScheduledSamplingConfig(Section):
    """The rollout: which samples, how far, by which solver, towards which target, which loss."""

    max_step_offset: NonNegativeInt = Field(
        0, description="K: the offset k is drawn per sample from 0..K; 0 turns rollouts off."
    )
    probability: Fraction = Field(0.0, description="Chance that a sample is rolled out.")
    ramp_steps: NonNegativeInt = Field(
        0, description="Ramp the chance from prob_start to prob_end over so many optimizer steps."
    )
    prob_start: Fraction = Field(0.0, description="Chance at the ramp's start.")
    prob_end: Fraction = Field(0.5, description="Chance at the ramp's end and afterwards.")
    start_step: NonNegativeInt = Field(0, description="Optimizer step at which the ramp begins.")
    ramp_shape: Literal["linear", "cosine"] = Field("linear", description="Shape of the ramp.")
    strategy: Literal["uniform", "biased_early", "biased_late"] = Field(
        "uniform", description="Law of k: U{0..K}, round(v^2 K) or round((1 - v^2) K)."
    )
    sampler: SolverName = Field("unipc", description="Solver of the rollout's ODE.")
    order: Literal["auto", 1, 2, 3] = Field(
        "auto", description="Order of dpm and unipc; auto is 2."
    )
    grid: PositiveInt | Literal["jump"] | None = Field(
        None,
        description="N: a rollout step is 1/N of the path; default: the training grid T. "
        "jump: one step of random length.",
    )
    target: Literal["original", "anchored"] = Field(
        "anchored", description="Target at the self-made latent: teacher-forced or consistent."
    )
    reflexflow: bool | Literal["auto"] = Field(
        "auto", description="ReflexFlow losses; auto: on for flow_matching when K > 0."
    )
    reflexflow_alpha: NonNegativeFloat = Field(
        1.0, description="Weight of the frequency compensation."
    )
    reflexflow_beta1: NonNegativeFloat = Field(
        10.0, description="Weight of the anti-drift (direction) term."
    )
    reflexflow_beta2: NonNegativeFloat = Field(
        1.0, description="Weight of the frequency-compensated loss."
    )
    reflexflow_norm: Literal["l1_sum", "l1_mean"] = Field(
        "l1_sum", description="Norm in the compensation weight: as published, or effective."
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


class BudgetConfig(Section):
    """When training ends: exactly one of the three; default 900 optimizer steps."""

    steps: PositiveInt | None = Field(None, description="Optimizer steps.")
    forward_equivalents: PositiveFloat | None = Field(
        None, description="Compute in forward equivalents (a trained sample costs 3)."
    )
    seconds: PositiveFloat | None = Field(None, description="Training time, evaluation excluded.")

    @model_validator(mode="before")
    @classmethod
    def _default_budget(cls, value: Any) -> Any:
        units = ("steps", "forward_equivalents", "seconds")
        if isinstance(value, dict) and all(value.get(unit) is None for unit in units):
            return {**value, "steps": 900}
        return value


class TrainingConfig(Section):
    """The loop: budget, batch, precision, checkpoints."""

    output_dir: str | None = Field(
        None, description="Folder of the run; default: runs/<name>-<time>."
    )
    budget: BudgetConfig = Field(default_factory=lambda: BudgetConfig(), description="The end.")
    batch_size: PositiveInt = Field(
        64, description="Samples per optimizer step, over all workers and micro-batches."
    )
    gradient_accumulation: PositiveInt = Field(
        1, description="Micro-batches per worker and optimizer step."
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Precision of the network; rollout states stay fp32."
    )
    checkpoint_every_steps: PositiveInt = Field(200, description="Optimizer steps between saves.")
    keep_last: PositiveInt = Field(2, description="Checkpoints kept.")
    log_every_steps: PositiveInt = Field(10, description="Steps between logged points.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train.")


class EvaluationConfig(Section):
    """Sampling from the EMA weights and measuring quality against the held-out reference."""

    enabled: bool = Field(True, description="Evaluate during and after training.")
    every_forward_equivalents: PositiveFloat | None = Field(
        None, description="Compute between evaluations; default: a quarter of the budget."
    )
    nfe: IntTuple = Field((5, 10), description="Network evaluations per sample; q is their mean.")
    num_samples: Annotated[int, Field(ge=8, le=LARGEST_INT)] = Field(
        400, description="Samples of an evaluation during training."
    )
    final_num_samples: Annotated[int, Field(ge=8, le=LARGEST_INT)] = Field(
        1000, description="Samples of the evaluation at the end of the budget."
    )
    batch_size: PositiveInt = Field(200, description="Samples per network call.")
    sampler: SolverName = Field("euler", description="Solver that generates the samples.")
    guidance_scale: Annotated[float, Field(ge=0.0)] = Field(
        1.0, description="Classifier-free guidance; 1 is off."
    )
    epsilon_scaling: Annotated[float, Field(ge=0.5, le=2.0)] | None = Field(
        1.005, description="Divisor of the second, Epsilon-Scaled column; null: leave it out."
    )
    metric: QualityMetric = Field("kid", description="q, lower is better.")
    features: Literal["auto", "pixels", "efficientnet_lite0"] = Field(
        "auto", description="Feature space; auto: pixels up to 32x32."
    )
    num_bootstrap: Annotated[int, Field(ge=20, le=LARGEST_INT)] = Field(
        200, description="Bootstrap replicates."
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = Field(
        0.95, description="Level of the intervals."
    )
    neighbours: PositiveInt = Field(5, description="k of precision, recall, density, coverage.")
    seed: NonNegativeInt = Field(1234, description="Seed of the sampling noise, for all trials.")
    grid_images: PositiveInt = Field(40, description="Images of the logged sample grid.")


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
    max_failures: NonNegativeInt = Field(
        2, description="Lost workers survived, each time from the last checkpoint."
    )


class RunConfig(Section):
    """One training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(
        "run", description="Name of the run and of its folder."
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="Seed of all randomness.")
    exposure: Literal["none", "scheduled_sampling"] = Field(
        "scheduled_sampling", description="Method against exposure bias; none: plain training."
    )
    prediction_type: PredictionType = Field(
        "flow_matching", description="What the network predicts."
    )
    data: DataConfig = Field(default_factory=lambda: DataConfig())
    model: ModelConfig = Field(default_factory=lambda: ModelConfig())
    noise_schedule: NoiseScheduleConfig = Field(default_factory=lambda: NoiseScheduleConfig())
    scheduled_sampling: ScheduledSamplingConfig = Field(
        default_factory=lambda: ScheduledSamplingConfig()
    )
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig())
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig())
    evaluation: EvaluationConfig = Field(default_factory=lambda: EvaluationConfig())
    tracking: TrackingConfig = Field(default_factory=lambda: TrackingConfig())
    scaling: ScalingConfig = Field(default_factory=lambda: ScalingConfig())

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, value: Any) -> Any:
        return _resolved(value) if isinstance(value, dict) else value


def _resolved(raw: dict[str, Any]) -> dict[str, Any]:
    """Fill the values that depend on others; leaves anything malformed to the validators."""
    out = dict(raw)
    noise, rollout = out.get("noise_schedule", {}), out.get("scheduled_sampling", {})
    if isinstance(noise, NoiseScheduleConfig) or isinstance(rollout, ScheduledSamplingConfig):
        return out
    noise, rollout = (dict(s) if isinstance(s, dict) else s for s in (noise, rollout))
    prediction = out.get("prediction_type")
    if isinstance(noise, dict):
        if "prediction_type" not in out and noise.get("kind", "flow") != "flow":
            prediction = out["prediction_type"] = "epsilon"
        if prediction in ("epsilon", "v_prediction", "sample"):
            noise.setdefault("kind", "linear")
        out["noise_schedule"] = noise
    if isinstance(rollout, dict):
        if rollout.get("grid") is None and isinstance(noise, dict):
            rollout["grid"] = noise.get("num_train_timesteps", 1000)
        if rollout.get("reflexflow", "auto") == "auto":
            offset = rollout.get("max_step_offset", 0)
            rollout["reflexflow"] = (
                prediction in (None, "flow_matching")
                and out.get("exposure", "scheduled_sampling") == "scheduled_sampling"
                and isinstance(offset, int)
                and offset > 0
            )
        out["scheduled_sampling"] = rollout
    return out
