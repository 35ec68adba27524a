"""Images of a folder: which files, which label each has, and their pixels.

A top-level subfolder is a class, however deep its images lie; images directly in the folder
(then without any subfolder of images) are a single class. Order: sorted by path.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from raysched.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"})
# Left behind by file managers; nobody means them as images.
LITTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class FolderListing:
    """Files in order, the class of each, and the classes' names."""

    files: list[Path]
    labels: list[int]
    class_names: tuple[str, ...]


def list_folder(root: Path) -> FolderListing:
    """Find the images and their classes, without opening one.

    Raises:
        DataError: no such folder, no images, files that aren't images, or classes unclear.
    """
    if not root.is_dir():
        what = "isn't a folder" if root.exists() else "doesn't exist"
        raise DataError(f"data.path: {root} {what}; set data.path to the folder of the images")
    files = sorted(_walk(root), key=lambda path: path.relative_to(root).parts)
    unsupported = [path for path in files if path.suffix.lower() not in SUFFIXES]
    if unsupported:
        raise DataError(
            f"data.path: {root} holds {len(unsupported)} file(s) that aren't images: "
            f"{_some(unsupported)}; move them elsewhere (supported: {' '.join(sorted(SUFFIXES))})"
        )
    if not files:
        raise DataError(
            f"data.path: {root} holds no images (looked for {' '.join(sorted(SUFFIXES))} in it "
            "and in its subfolders)"
        )
    tops = [path.relative_to(root).parts for path in files]
    direct = [path for path, parts in zip(files, tops, strict=True) if len(parts) == 1]
    if len(direct) == len(files):
        return FolderListing(files, [0] * len(files), (root.resolve().name or "images",))
    if direct:
        raise DataError(
            f"data.path: {root} holds images directly ({_some(direct)}) beside class folders; "
            "move them into a subfolder, its name is their class"
        )
    names = sorted({parts[0] for parts in tops})
    number = {name: label for label, name in enumerate(names)}
    return FolderListing(files, [number[parts[0]] for parts in tops], tuple(names))


def _walk(root: Path) -> list[Path]:
    """All files below `root` but hidden ones and litter; follows links, never in circles."""
    found: list[Path] = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not _is_litter(name))
        found += [Path(folder) / name for name in names if not _is_litter(name)]
    return found


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in LITTER


def decode_folder(listing: FolderListing, image_size: int, grayscale: bool) -> NDArray[np.uint8]:
    """Decode all images of a listing.

    Returns:
        (N, C, H, W) uint8, C = 1 if grayscale else 3.

    Raises:
        DataError: some files can't be decoded; names them.
    """
    channels = 1 if grayscale else 3
    images = np.empty((len(listing.files), channels, image_size, image_size), dtype=np.uint8)
    broken: list[Path] = []
    reason = ""
    for row, path in enumerate(listing.files):
        try:
            images[row] = decode_image(path, image_size, grayscale)
        # Pillow's decoders raise these for damaged data, whatever the format.
        except (
            OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError
        ) as error:  # fmt: skip
            broken.append(path)
            reason = reason or _reason(error)
    if broken:
        raise DataError(
            f"data.path: {len(broken)} image(s) can't be decoded: {_some(broken)} ({reason}); "
            "replace or remove them"
        )
    return images


def decode_image(path: Path, image_size: int, grayscale: bool) -> NDArray[np.uint8]:
    """Decode one image: (C, H, W) uint8, upright, resized and center-cropped, on white."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):
            # Pillow would clip 16 bits to 255 instead of scaling them.
            values = np.asarray(image, dtype=np.int64)
            scaled = values // 257 if values.max(initial=0) > 255 else values
            image = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
        image = resize_and_crop(_on_white(image), image_size)
        if grayscale:
            return np.asarray(image.convert("L"), dtype=np.uint8)[None]
        return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


def resize_and_crop(image: Image.Image, image_size: int) -> Image.Image:
    """Scale the shorter edge to `image_size` and cut the middle of the longer one."""
    return ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layer).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or cut short"
    return str(error) or type(error).__name__


def _some(paths: list[Path]) -> str:
    more = len(paths) - SHOWN_PROBLEMS
    shown = ", ".join(str(path) for path in paths[:SHOWN_PROBLEMS])
    return f"{shown} and {more} more" if more > 0 else shown
