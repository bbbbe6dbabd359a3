"""Pictures of shapes, drawn by number: something to try segmentation on without any files.

Shapes stand on a grey ground under noise, and before each other. A class has hues of its own, so that a small model learns
it in minutes; what it must find are the outlines.
"""

import colorsys

import numpy as np
from PIL import Image, ImageDraw

SHAPES = "builtin:shapes"

_CLASSES = ("ground", "disc", "box", "triangle", "ring")
_SIZE = 96
_PICTURES = {"train": 240, "val": 60}
_MOST_SHAPES = 4


class ShapesSource:
    """Generated pictures and masks; a `SegmentationSource`.

    Args:
        split: ``train`` or ``val``.
        palette: ``[C, 3]`` uint8, a colour for each class.
    """

    classes: tuple[str, ...] = _CLASSES
    resize: tuple[int, int] | None = None

    def __init__(self, split: str, palette: np.ndarray):
        self.split, self.palette = split, palette
        self.skipped: list[tuple[str, str]] = []
        self.seen = set(range(len(_CLASSES)))

    def __len__(self) -> int:
        return _PICTURES[self.split]

    def name(self, index: int) -> str:
        return f"{self.split}-{index:03d}"

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """The picture, 96 x 96 pixels of RGB, and its class numbers."""
        rng = np.random.default_rng([len(self), index])
        image = Image.new("RGB", (_SIZE, _SIZE), _colour(rng, 0))
        mask = Image.new("L", (_SIZE, _SIZE), 0)
        for _ in range(rng.integers(2, _MOST_SHAPES + 1)):
            shape = int(rng.integers(1, len(_CLASSES)))
            radius, centre = rng.uniform(16, 30), rng.uniform(12, _SIZE - 12, 2)
            colour, angle = _colour(rng, shape), rng.uniform(0, 360)
            behind = image.copy(), mask.copy()
            for canvas, fill in ((image, colour), (mask, shape)):
                _draw(ImageDraw.Draw(canvas), _CLASSES[shape], centre, radius, angle, fill)
            if _CLASSES[shape] == "ring":  # what stands behind shows through
                hole = Image.new("L", (_SIZE, _SIZE), 0)
                _draw(ImageDraw.Draw(hole), "disc", centre, radius * 0.5, 0, 255)
                image.paste(behind[0], mask=hole)
                mask.paste(behind[1], mask=hole)
        noisy = np.asarray(image, dtype=np.float64) + rng.normal(0, 12, (_SIZE, _SIZE, 3))
        return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)), np.asarray(mask).copy()


def _draw(
    draw: ImageDraw.ImageDraw, shape: str, centre: np.ndarray, radius: float, angle: float, fill: int | tuple[int, int, int]
) -> None:
    x, y = centre
    if shape in ("disc", "ring"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    else:
        draw.regular_polygon((x, y, radius), 4 if shape == "box" else 3, rotation=angle, fill=fill)


def _colour(rng: np.random.Generator, shape: int) -> tuple[int, int, int]:
    """A shade of grey for the ground; for a shape one of its class's hues."""
    if shape == 0:
        level = int(rng.integers(40, 216))
        return level, level, level
    hue = (shape + rng.uniform(-0.3, 0.3)) / (len(_CLASSES) - 1)
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.5, 1), rng.uniform(0.5, 1))
    return round(255 * red), round(255 * green), round(255 * blue)
