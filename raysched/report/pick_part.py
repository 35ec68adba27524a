"""What `raysched pick` found, for the sweep's page: it outranks the sweep's own verdict."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path
from typing import Any

from raysched.errors import StorageError
from raysched.tuning.pick_plan import PICK_FOLDER


def pick_parts(folder: Path) -> list[str]:
    """HTML of the pick in a sweep's folder; empty without a finished one.

    Raises:
        StorageError: its result is damaged.
    """
    path = folder / PICK_FOLDER / "result.json"
    if not path.is_file():
        return []
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StorageError(f"{path}: can't be read: {error}; remove it to go on") from error
    if not stored.get("verdict"):
        return []
    text = escape(stored["verdict"]["text"])
    parts = [f'<p class="verdict"><strong>On fresh seeds (raysched pick).</strong> {text}</p>']
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in stored.get("reasons", []))
    parts.append(f"<ul>{reasons}</ul>" if reasons else "")
    sheet = folder / PICK_FOLDER / "contact_sheet.png"
    if sheet.is_file():
        data = base64.b64encode(sheet.read_bytes()).decode("ascii")
        parts.append(
            f'<figure><img alt="Contact sheet" src="data:image/png;base64,{data}"><figcaption>The '
            "same noise in every column, one row per candidate.</figcaption></figure>"
        )
    return parts
