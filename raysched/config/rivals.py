"""The sections of the methods that compete with scheduled sampling, one small section each.

A run chooses one by `exposure`; the sections of the others are left alone.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raysched.config.sections import Fraction, NonNegativeFloat, Section


class InputPerturbationConfig(Section):
    """Noise on the noise: the input gets eps + gamma·xi, the target stays that of eps."""

    gamma: NonNegativeFloat = Field(
        0.1, description="Share of a second noise in the input's; 0: plain training."
    )


class SelfCorrectionConfig(Section):
    """The model's own estimate of the data, noised again, as the input."""

    probability: Fraction = Field(0.5, description="Chance that a sample is corrected.")
    noise: Literal["fresh", "same"] = Field(
        "fresh", description="Noise that the estimate gets: drawn anew, or the sample's own."
    )


class DefarConfig(Section):
    """One jump of random length by the model itself, for every sample, with ReflexFlow's loss."""

    alpha: NonNegativeFloat = Field(1.0, description="Weight of the frequency compensation.")
    beta1: NonNegativeFloat = Field(10.0, description="Weight of the anti-drift term.")
    beta2: NonNegativeFloat = Field(1.0, description="Weight of the compensated loss.")
    norm: Literal["l1_sum", "l1_mean"] = Field(
        "l1_sum", description="Norm in the compensation weight: as published, or effective."
    )
    jump_gradient: bool = Field(
        False,
        description="Train through the jump, at 3 FE for its forward.",
    )


class MixFlowConfig(Section):
    """A noisier interpolant than the network is told."""

    gamma: Fraction = Field(
        0.8, description="Largest share of the way to pure noise; 0: plain training."
    )


class DreamConfig(Section):
    """Input and target moved by the share sigma^p of the model's own error."""

    power: Annotated[float, Field(ge=0.0, le=100.0)] = Field(
        1.0, description="p: the larger, the less is moved at low noise."
    )
