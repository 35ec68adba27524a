"""The section of the rollouts: which samples, how far, by what, and what is made of the result.

All defaults together are the plain method; every other value is a variation of it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raysched.config.sections import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Section,
    SolverName,
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
    start_step: NonNegativeInt = Field(0, description="Optimizer step at which the ramps begin.")
    ramp_shape: Literal["linear", "cosine"] = Field("linear", description="Shape of the ramps.")
    offset_ramp_steps: NonNegativeInt = Field(
        0, description="Ramp K from offset_start to max_step_offset over so many optimizer steps."
    )
    offset_start: NonNegativeInt = Field(0, description="K at the start of its ramp.")
    strategy: Literal["uniform", "biased_early", "biased_late"] = Field(
        "uniform", description="Law of k: U{0..K}, round(v^2 K) or round((1 - v^2) K)."
    )
    stratified: bool = Field(
        False, description="Exact histogram of k in every step instead of independent draws."
    )
    t_min: Fraction = Field(
        0.0, description="Targets at path times t (after the shift) below are teacher-forced."
    )
    t_max: Fraction = Field(
        1.0, description="Targets at path times t (after the shift) above are teacher-forced."
    )
    source_t_max: Fraction = Field(
        1.0, description="Noisiest path time t of a source; k is clamped to stay below."
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
    ancestral: bool = Field(
        False, description="Stochastic rollouts: fresh noise in every step; sampler euler only."
    )
    guidance_scale: NonNegativeFloat = Field(
        1.0, description="Classifier-free guidance in rollouts, two forwards each; 1 is off."
    )
    policy: Literal["online", "ema"] = Field(
        "online", description="Whose weights roll out: those in training, or their average."
    )
    dropout: bool = Field(False, description="Keep the network's dropout on in rollouts.")
    bucket: PositiveInt = Field(
        1, description="Pad the rows of a rollout's network calls to a multiple; padding counts."
    )
    target: Literal["original", "anchored", "posterior_mean"] = Field(
        "anchored",
        description="Target at the self-made latent: teacher-forced, consistent with it, or "
        "consistent with the mean of the data given it.",
    )
    posterior_reference: PositiveInt = Field(
        256, description="posterior_mean: training images drawn per step as its reference."
    )
    reuse: Literal["last", "all"] | PositiveInt = Field(
        "last",
        description="States of a rollout that are trained on: the last, all, or at most so many, "
        "evenly spaced; each costs as much as a sample.",
    )
    jump_gradient: bool = Field(
        False, description="grid jump: train through the jump, at 3 FE for its forward."
    )
    max_fallback_share: Fraction = Field(
        0.1,
        description="Rollouts that may end in no finite number and fall back to teacher forcing, "
        "as a share of a step's; more than that, and more than one, stop the run.",
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
