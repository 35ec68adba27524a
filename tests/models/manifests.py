"""Manifests for checkpoint folders that tests make or change by hand."""

from __future__ import annotations

import json
from pathlib import Path

from raysched.models.tensor_files import sha256_of


def write_manifest(folder: Path) -> None:
    """Vouch for the tensor files of a folder as they are now."""
    digests = {path.name: sha256_of(path) for path in folder.glob("*.safetensors")}
    if (folder / "state.json").is_file():
        digests["state.json"] = sha256_of(folder / "state.json")
    content = {"format_version": 1, "sha256": digests}
    (folder / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
