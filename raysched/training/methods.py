"""Every method against exposure bias by the name that a run's `exposure` gives it."""

from __future__ import annotations

from collections.abc import Callable

from raysched.config.run import ExposureMethod
from raysched.training.batch import Batch
from raysched.training.exposure import scheduled_sampling, teacher_forced
from raysched.training.inputs import TrainingInputs
from raysched.training.rivals import (
    defar,
    dream,
    input_perturbation,
    mixflow,
    self_correction,
)
from raysched.training.setup import Run

METHODS: dict[ExposureMethod, Callable[[Run, Batch], TrainingInputs]] = {
    "none": teacher_forced,
    "scheduled_sampling": scheduled_sampling,
    "input_perturbation": input_perturbation,
    "self_correction": self_correction,
    "defar": defar,
    "mixflow": mixflow,
    "dream": dream,
}
