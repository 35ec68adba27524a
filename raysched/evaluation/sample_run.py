"""The work of `raysched sample`: images from a trained model, as one picture or one by one.

Legend: n images, C channels, H and W pixels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raysched.config.run import SolverName
from raysched.data.dataset import to_pixels
from raysched.errors import RunFailedError, UserError
from raysched.evaluation.grids import enlarged, sample_grid, save_png
from raysched.evaluation.model_source import ModelSource, Weights, best_device, load_model
from raysched.evaluation.sampling import balanced_labels, evaluation_noise, generate

BATCH = 200
ONE_CLASS_COLUMNS = 10


@dataclass(frozen=True)
class SampleResult:
    """What was written.

    Args:
        grid: the picture of all images.
        images: the single images, if they were asked for.
        loaded_from: folder of the weights.
        num_images: images drawn.
        nfe: network evaluations per image that were asked for.
        sampler: the solver.
        guidance_scale: classifier-free guidance.
        seed: of the noise.
        class_label: the class of all images; None: all classes in turn.
        weights: ema or online.
        notes: what the user should know.
    """

    grid: Path
    images: tuple[Path, ...]
    loaded_from: Path
    num_images: int
    nfe: int
    sampler: SolverName
    guidance_scale: float
    seed: int
    class_label: int | None
    weights: Weights
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The same in JSON types."""
        return {
            **asdict(self),
            "grid": str(self.grid),
            "images": [str(path) for path in self.images],
            "loaded_from": str(self.loaded_from),
            "notes": list(self.notes),
        }


def sample_run(
    path: Path | str,
    num_images: int = 40,
    nfe: int = 10,
    sampler: SolverName = "euler",
    guidance_scale: float = 1.0,
    seed: int = 0,
    class_label: int | None = None,
    out: Path | str | None = None,
    weights: Weights = "ema",
    save_images: bool = False,
) -> SampleResult:
    """Draw images from a run, a checkpoint or a pipeline, and write them as PNG.

    Args:
        path: folder of the run, of the checkpoint or of the pipeline.
        num_images: n.
        nfe: network evaluations per image; see `num_steps` for how it rounds.
        sampler: name of the solver.
        guidance_scale: classifier-free guidance; 1 is off.
        seed: seed of the noise.
        class_label: one class for all; default: all in turn.
        out: the PNG; default: `samples/` in the run's folder.
        weights: averaged or last weights.
        save_images: write every image by itself too, in a folder beside the picture.

    Returns:
        The files and the settings.

    Raises:
        UserError: there is no such model, class or place to write to.
        RunFailedError: the network gives values that are not finite.
    """
    model = load_model(Path(path), weights)
    labels = _labels(model, num_images, class_label, guidance_scale)
    samples = generate(
        model.network.to(best_device()),
        model.schedule,
        model.prediction_type,
        labels=labels,
        noise=evaluation_noise(seed, num_images, model.shape),
        nfe=nfe,
        solver=sampler,
        batch_size=BATCH,
        null_class=len(model.class_names),
        guidance_scale=guidance_scale,
    )
    if not bool(samples.isfinite().all()):
        raise RunFailedError(
            f"{model.loaded_from}: the network gives values that are not finite: its training "
            "diverged; sample an earlier checkpoint"
        )
    images = to_pixels(samples)
    target = Path(out) if out else _default_target(model, nfe, sampler, seed, class_label)
    return SampleResult(
        grid=save_png(_picture(images, labels, class_label, len(model.class_names)), target),
        images=_single_images(images, labels, target) if save_images else (),
        loaded_from=model.loaded_from,
        num_images=num_images,
        nfe=nfe,
        sampler=sampler,
        guidance_scale=guidance_scale,
        seed=seed,
        class_label=class_label,
        weights=weights,
        notes=model.notes,
    )


def _labels(
    model: ModelSource, num: int, class_label: int | None, guidance_scale: float
) -> Tensor:
    count = len(model.class_names)
    if not model.network.class_conditional and (class_label is not None or guidance_scale != 1.0):
        raise UserError(
            f"{model.loaded_from}: the model knows no classes (model.class_conditional: false): "
            "leave --class-label and --guidance-scale out"
        )
    if class_label is None:
        return balanced_labels(num, count)
    if not 0 <= class_label < count:
        names = ", ".join(f"{i}: {name}" for i, name in enumerate(model.class_names[:20]))
        more = ", ..." if count > 20 else ""
        raise UserError(
            f"--class-label: must be in 0..{count - 1}, got {class_label}; classes: {names}{more}"
        )
    return torch.full((num,), class_label, dtype=torch.int64)


def _picture(images: Tensor, labels: Tensor, class_label: int | None, num_classes: int) -> Any:
    """All images: a column per class, or rows of ten where there is one class only."""
    num = len(images)
    if class_label is not None or num_classes == 1:
        num_classes = min(num, ONE_CLASS_COLUMNS)
        labels = torch.arange(num) % num_classes
    columns = min(num, num_classes)
    rows = -(-num // columns)
    return sample_grid(images, labels, num_classes=columns, max_images=rows * columns)


def _default_target(
    model: ModelSource, nfe: int, sampler: SolverName, seed: int, class_label: int | None
) -> Path:
    which = "" if class_label is None else f"-class_{class_label}"
    return model.home / "samples" / f"{sampler}-nfe_{nfe}-seed_{seed}{which}.png"


def _single_images(images: Tensor, labels: Tensor, target: Path) -> tuple[Path, ...]:
    folder = target.with_name(f"{target.stem}-images")
    return tuple(
        save_png(enlarged(image, 1), folder / f"{number:05d}-class_{int(label)}.png")
        for number, (image, label) in enumerate(zip(images, labels, strict=True))
    )
