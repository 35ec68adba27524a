"""JSON schemas for editors, made from the models; flat keys are properties too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raysched.config.entries import MARKER
from raysched.config.fields import RUN, flat_key
from raysched.config.run import RunConfig
from raysched.config.sweep import KINDS, SweepConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def run_schema() -> dict[str, Any]:
    """The schema of a run's file."""
    schema = RunConfig.model_json_schema()
    schema["properties"] |= _flat_properties()
    schema["properties"][MARKER] = {
        "type": "string",
        "description": "Written by raysched: the version that spelled all settings out.",
    }
    return {"$schema": DIALECT, **_tidy(schema), "title": "raysched run"}


def _flat_properties() -> dict[str, Any]:
    """The flat spelling of each rollout setting."""
    flat = {flat_key(path): (path, field) for path, field in RUN.leaves.items()}
    return {
        key: {**field, "description": f"{field['description']} (The same as {path}.)"}
        for key, (path, field) in flat.items()
        if key != path
    }


def sweep_schema() -> dict[str, Any]:
    """The schema of a sweep's file; the space's keys are the run's settings."""
    schema = SweepConfig.model_json_schema()
    searched = schema["properties"]["space"]
    dimension = searched.pop("additionalProperties")
    keys = [*RUN.leaves, *_flat_properties()]
    searched["properties"] = dict.fromkeys(keys, dimension)
    searched["additionalProperties"] = False
    definition = schema["$defs"]["Dimension"]
    # In a file exactly one kind is given; the model's other kinds are null.
    definition["oneOf"] = [{"required": [kind]} for kind in KINDS]
    for kind, field in definition["properties"].items():
        definition["properties"][kind] = next(
            option for option in field["anyOf"] if option.get("type") != "null"
        )
    return {"$schema": DIALECT, **_tidy(schema), "title": "raysched sweep"}


def _tidy(node: Any) -> Any:
    """Without the titles that pydantic makes of field names, which editors show as noise."""
    if isinstance(node, dict):
        kept = {k: v for k, v in node.items() if not (k == "title" and isinstance(v, str))}
        return {key: _tidy(value) for key, value in kept.items()}
    return [_tidy(value) for value in node] if isinstance(node, list) else node


def schema_text(schema: dict[str, Any]) -> str:
    """A schema as the text of its file."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def write_schemas(folder: str | Path) -> list[Path]:
    """Write both schemas to a folder and return their paths."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    made = {"run.schema.json": run_schema(), "sweep.schema.json": sweep_schema()}
    for name, schema in made.items():
        (target / name).write_text(schema_text(schema), encoding="utf-8")
    return [target / name for name in made]
