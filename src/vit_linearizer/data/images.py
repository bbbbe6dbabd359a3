"""From files to RGB pictures: which files are images, and how each kind is read.

Orientation from EXIF is applied; grey, palette, CMYK, 16-bit and float images become 8-bit RGB; transparency is laid over
white. A file that cannot be read is a fact to report, never a reason to stop.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..contracts import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class UnreadableImageError(Exception):
    """A file that is no image after all; the message is the reason in one line."""


def read_image(path: Path) -> Image.Image:
    """Decode one file to an 8-bit RGB image, upright.

    Raises:
        UnreadableImageError: broken, truncated, empty, or far too large to be a photograph.
    """
    try:
        with Image.open(path) as opened:
            return to_rgb(ImageOps.exif_transpose(opened))
    except Exception as error:  # Pillow's decoders raise whatever their format made them trip over
        raise UnreadableImageError(_reason(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to 8-bit RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        # 16-bit greys arrive as I;16 or I; a float image holds either [0, 1] or [0, 255].
        full = 65535 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 255
        full = 1 if image.mode == "F" and values.max(initial=0) <= 1 else full
        return Image.fromarray(np.clip(np.rint(values / full * 255), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def scan_folder(folder: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """All images under a folder, found recursively and in a fixed order, and the files whose header is unreadable.

    Args:
        folder: where to look; hidden files and folders are passed over, links are followed once.

    Returns:
        Paths relative to ``folder``, sorted; and (path, reason) of what was skipped.

    Raises:
        UserError: no such folder, or no readable image in it.
    """
    if not folder.is_dir():
        raise UserError("--data", folder, "no such folder; give a folder of images, or builtin:digits")
    paths = sorted(walk_images(folder), key=lambda path: path.as_posix())
    with ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as pool:
        reasons = list(pool.map(lambda path: header_problem(folder / path), paths))
    readable = [path for path, reason in zip(paths, reasons, strict=True) if reason is None]
    skipped = [(path, reason) for path, reason in zip(paths, reasons, strict=True) if reason is not None]
    if not readable:
        detail = f"none of its {len(skipped)} image files can be read" if skipped else "holds no images"
        raise UserError("--data", folder, f"{detail}; expected {' '.join(EXTENSIONS)} files, in any depth of folders")
    return readable, skipped


def walk_images(folder: Path) -> Iterator[Path]:
    """Image files of a folder by their names, relative to it, in no order that means anything; links are followed once."""
    seen = set()
    for current, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(current)
        if real in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield Path(current, name).relative_to(folder)


def header_problem(path: Path) -> str | None:
    """Why a file is no image, from its first bytes, in one line; None where it looks like one."""
    try:
        with Image.open(path):
            return None
    except Exception as error:  # as in read_image
        return _reason(error)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
