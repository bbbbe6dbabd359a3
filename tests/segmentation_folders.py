"""Small segmentation data sets of generated shapes, in the three layouts that `open_segmentation` reads."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ground", "disc", "box")

#: Colours of the drawn classes, by their place.
COLOURS = np.array([(90, 140, 60), (220, 60, 50), (50, 80, 220), (230, 220, 60)], dtype=np.uint8)

#: Labels of ADE20K that the shapes get: wall, door, car. 0 is "other", and ignored.
ADE20K_LABELS = (1, 15, 21)
#: Ids of Cityscapes: road, bicycle, person. 0 is "unlabeled", and ignored.
CITYSCAPES_IDS = (7, 33, 24)


def shapes(rng: np.random.Generator, size: tuple[int, int], classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """A ground of class 0 with a disc or box of every other class on it.

    Args:
        rng: decides places, sizes and noise.
        size: (height, width) in pixels.
        classes: how many, up to 4.

    Returns:
        uint8 ``[H, W, 3]``, each class in its colour with some noise, and uint8 ``[H, W]`` class numbers.
    """
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    mask = np.zeros(size, dtype=np.uint8)
    for number in range(1, classes):
        radius = min(size) * rng.uniform(0.15, 0.3)
        down, right = np.abs(rows - rng.uniform(0.2, 0.8) * height), np.abs(columns - rng.uniform(0.2, 0.8) * width)
        mask[np.hypot(down, right) < radius if number % 2 else np.maximum(down, right) < radius] = number
    noisy = COLOURS[mask] + rng.normal(0, 12, (*size, 3))
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8), mask


def save(image: np.ndarray, mask: np.ndarray, image_path: Path, mask_path: Path) -> None:
    """Write a pair of files; the mask as a greyscale PNG."""
    for path in (image_path, mask_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(image_path)
    Image.fromarray(mask).save(mask_path)


def write_folder(
    path: Path, *, pictures: int = 4, size: tuple[int, int] = (48, 64), classes: Sequence[str] = CLASSES, seed: int = 0
) -> Path:
    """``images/{train,val}/NUMBER.png``, ``masks/{train,val}/NUMBER.png`` and ``classes.txt``.

    Args:
        path: the folder to make.
        pictures: in each split.
        size: (height, width) in pixels.
        classes: their names, up to 4.
        seed: of the shapes.

    Returns:
        ``path``.
    """
    rng = np.random.default_rng(seed)
    for split in ("train", "val"):
        for number in range(pictures):
            name = f"{split}/{number:02d}.png"
            save(*shapes(rng, size, len(classes)), path / "images" / name, path / "masks" / name)
    (path / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    return path


def write_ade20k(path: Path, *, pictures: int = 4, size: tuple[int, int] = (48, 64), seed: int = 0) -> Path:
    """``ADEChallengeData2016`` with labels `ADE20K_LABELS`, a frame of label 0, and a table of classes.

    Args:
        path: the folder to make it in.
        pictures: in each split.
        size: (height, width) in pixels.
        seed: of the shapes.

    Returns:
        ``path``.
    """
    rng = np.random.default_rng(seed)
    root = path / "ADEChallengeData2016"
    for part, short in (("training", "train"), ("validation", "val")):
        for number in range(1, pictures + 1):
            name = f"{part}/ADE_{short}_{number:08d}"
            image, mask = shapes(rng, size)
            labels = framed(np.array(ADE20K_LABELS, dtype=np.uint8)[mask])
            save(image, labels, root / "images" / f"{name}.jpg", root / "annotations" / f"{name}.png")
    known = {1: "wall", 15: "door, double door", 21: "car, auto, automobile"}
    rows = [f"{number}\t0.1\t9\t{math.isqrt(number)}\t{known.get(number, f'thing {number}')}" for number in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows, ""]), encoding="utf-8")
    return path


def write_cityscapes(path: Path, *, pictures: int = 4, size: tuple[int, int] = (48, 96), seed: int = 0) -> Path:
    """``leftImg8bit`` and ``gtFine`` of two cities a split, with ids `CITYSCAPES_IDS` and a frame of id 0.

    Args:
        path: the folder to make.
        pictures: in each split.
        size: (height, width) in pixels.
        seed: of the shapes.

    Returns:
        ``path``.
    """
    rng = np.random.default_rng(seed)
    for split, cities in (("train", ("aachen", "ulm")), ("val", ("lindau", "munster"))):
        for number in range(pictures):
            city = cities[number % 2]
            stem = f"{split}/{city}/{city}_{number:06d}_000019"
            image, mask = shapes(rng, size)
            ids = framed(np.array(CITYSCAPES_IDS, dtype=np.uint8)[mask])
            save(
                image, ids, path / "leftImg8bit" / f"{stem}_leftImg8bit.png", path / "gtFine" / f"{stem}_gtFine_labelIds.png"
            )
    return path


def framed(mask: np.ndarray) -> np.ndarray:
    """The same with zeros along its border."""
    mask[[0, -1]], mask[:, [0, -1]] = 0, 0
    return mask
