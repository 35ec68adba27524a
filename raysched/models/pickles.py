"""Pickles are refused: unpickling runs whatever code the file's writer put there.

That holds for everything torch.save writes, and for a pickle that was given another name.
"""

from __future__ import annotations

import re
from pathlib import Path

from raysched.errors import UserError

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".th", ".joblib")
_ZIP, _LEGACY_TORCH = b"PK\x03\x04", b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# PROTO 2 to 5; a safetensors file, whose length may begin so too, has `{` as its ninth byte.
_PICKLE = re.compile(rb"^\x80[\x02-\x05](?!.{6}\{)", re.DOTALL)


class PickleError(UserError):
    """A file is a pickle, which is never loaded."""


def looks_pickled(path: Path) -> bool:
    """Whether a file's name or first bytes are those of a pickle; the file isn't loaded."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with path.open("rb") as stream:
            head = stream.read(32)
    except OSError:
        return False  # whoever opens it next says what is wrong
    return head.startswith((_ZIP, _LEGACY_TORCH)) or _PICKLE.match(head) is not None


def refuse_pickle(path: Path) -> None:
    """Let nothing pass that only unpickling could read.

    Raises:
        PickleError: the file is, or claims to be, a pickle.
    """
    if looks_pickled(path):
        raise PickleError(
            f"{path}: refused: this is a pickle (a file of torch.save), and loading one runs the "
            "code inside it. raysched reads safetensors only: convert it where you trust it "
            "(torch.load(..., weights_only=True), then safetensors.torch.save_file)"
        )


def refuse_pickled_folder(folder: Path) -> None:
    """Refuse a folder that should hold a model, but holds pickles, under whatever name.

    Pickles that lie beside good safetensors are nobody's business: they are never read.

    Raises:
        PickleError: names the first of them.
    """
    readable = sorted(folder.glob("*.safetensors"))
    for path in readable:
        refuse_pickle(path)
    for path in [] if readable else sorted(folder.iterdir()):
        if path.is_file() and path.suffix.lower() in SUFFIXES:
            refuse_pickle(path)
