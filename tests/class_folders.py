"""Small labelled pictures in class folders: every class has a colour, under noise."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

#: Six, so that the best five of them are not all.
CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox")

#: Colour of each class, by its place.
COLOURS = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60), (60, 200, 200), (200, 60, 200)])


def write_class(folder: Path, number: int, pictures: int, *, size: int = 20, noise: float = 60.0, seed: int = 0) -> None:
    """``NUMBER.png`` in the folder of a class.

    Args:
        folder: of the class; made when it is not there.
        number: of the class.
        pictures: how many.
        size: their side, in pixels.
        noise: deviation of every value.
        seed: of the noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, number])
    for place in range(pictures):
        pixels = COLOURS[number] + rng.normal(0, noise, (size, size, 3))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{place:02d}.png")


def write_split(
    path: Path, *, train: int = 4, val: int = 3, classes: Sequence[str] = CLASSES, size: int = 20, noise: float = 60.0
) -> Path:
    """``train/CLASS/NUMBER.png`` and ``val/CLASS/NUMBER.png``.

    Args:
        path: the folder to make.
        train: pictures a class in ``train``.
        val: the same in ``val``.
        classes: names, up to six.
        size: side of the pictures, in pixels.
        noise: deviation of every value.

    Returns:
        ``path``.
    """
    for seed, (part, pictures) in enumerate((("train", train), ("val", val))):
        for number, name in enumerate(classes):
            write_class(path / part / name, number, pictures, size=size, noise=noise, seed=seed)
    return path


def break_body(file: Path) -> None:
    """Leave a picture its header and cut off half of the rest, so that only reading it shows that it is broken."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
