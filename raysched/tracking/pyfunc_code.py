"""The code of a logged model: a pipeline folder as an `mlflow.pyfunc` model that draws images.

A copy of this file lies beside the model in MLflow, and nothing here needs raysched:

    import mlflow
    model = mlflow.pyfunc.load_model("models:/MODEL_ID")
    images = model.predict({"class_label": [3, 8]}, params={"num_inference_steps": 10})

B images of H x W pixels with C channels.
"""

from typing import Any

import mlflow
import numpy as np


class ImageModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Draws one image per row of its input."""

    def load_context(self, context: Any) -> None:
        """Load the pipeline that lies among the model's artifacts."""
        from diffusers import DiffusionPipeline

        folder = context.artifacts["pipeline"]
        # The folder's own pipeline.py; it came with the model.
        self.pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        self.pipeline.set_progress_bar_config(disable=True)

    # Without annotations: MLflow would take them for the model's schema, which is given apart.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Draw images.

        Args:
            context: MLflow's.
            model_input: a table with the column `class_label`, one row per image.
            params: num_inference_steps, guidance_scale, seed.

        Returns:
            (B, H, W, C) uint8.
        """
        import torch

        settings = params or {}
        seed = int(settings.get("seed", 0))
        output = self.pipeline(
            class_labels=[int(label) for label in model_input["class_label"]],
            num_inference_steps=int(settings.get("num_inference_steps", 10)),
            guidance_scale=float(settings.get("guidance_scale", 1.0)),
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        )
        return (output.images * 255).round().astype(np.uint8)


mlflow.models.set_model(ImageModel())
