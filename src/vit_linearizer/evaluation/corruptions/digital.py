"""Low contrast, a wrinkled picture, coarse pixels and strong compression.

Source: ImageNet-C (arXiv 1903.12261), its formulas and tables. The elastic transform has two regimes there: severities 1 and
2 bend the whole picture, 3 to 5 wrinkle it in small places and hardly move the rest. So the distance to the original falls
from 2 to 3; it grows within each regime. Choices: the moved corners of the elastic transform say where to read, not where
to write, and both its parts are read at once.
"""

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from .parts import REFERENCE, fit, frame, look_up, pixel_places, random_field, scale

#: Share of the contrast that is left.
_CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
#: (strength and deviation of the displacement, largest move of a corner), in pixels of a 224-pixel picture; the tables are
#: ImageNet-C's shares of 244.
_ELASTIC = ((488.0, 170.8, 24.4), (488.0, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88))
#: Share of the pixels that are left, along each side.
_PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)
#: JPEG's quality.
_JPEG = (25, 18, 15, 10, 7)


def contrast(image: Tensor, severity: int, rng: np.random.Generator) -> Tensor:  # noqa: ARG001
    """Bring every channel of ``[3, H, W]`` closer to its mean, by `_CONTRAST`."""
    mean = image.mean((1, 2), keepdim=True)
    return (image - mean) * _CONTRAST[severity - 1] + mean


def elastic_transform(image: Tensor, severity: int, rng: np.random.Generator) -> Tensor:
    """Read ``[3, H, W]`` through a random affine map and a random smooth displacement.

    The affine map moves three corners of the middle square, of two thirds of the short side, by uniform amounts; the
    displacement is uniform noise in [-1, 1] for each pixel of the frame, smoothed by a Gaussian and times the strength.
    """
    strength, sigma, furthest = _ELASTIC[severity - 1]
    height, width = frame(image)
    moves = torch.stack([_smooth_noise((height, width), rng, sigma) for _ in range(2)])
    rows, columns = pixel_places(*image.shape[-2:])
    moved = torch.stack([rows, columns]) + scale(image) * strength * fit(moves, image)

    middle, reach = (np.array(image.shape[-2:]) - 1) / 2, scale(image) * (REFERENCE // 3)
    corners = middle + reach * np.array([(1, 1), (1, -1), (-1, -1)])
    read_from = corners + scale(image) * rng.uniform(-furthest, furthest, corners.shape)
    # One row for each corner: (row, column, 1) @ affine = where it is read.
    affine = np.linalg.solve(np.column_stack([corners, np.ones(3)]), read_from)
    matrix = torch.from_numpy(affine).float()
    places = torch.einsum("chw,cd->dhw", moved, matrix[:2]) + matrix[2].reshape(2, 1, 1)
    return look_up(image, places[:1], places[1:])[0]


def pixelate(image: Tensor, severity: int, rng: np.random.Generator) -> Tensor:  # noqa: ARG001
    """Shrink ``[3, H, W]`` to a share `_PIXELATE` of each side and enlarge it again, by Pillow's box filter."""
    height, width = image.shape[-2:]
    small = int(width * _PIXELATE[severity - 1]), int(height * _PIXELATE[severity - 1])
    channels = [Image.fromarray(channel.numpy()) for channel in image]
    boxed = [c.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BOX) for c in channels]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in boxed]))


def jpeg_compression(image: Tensor, severity: int, rng: np.random.Generator) -> Tensor:  # noqa: ARG001
    """Round ``[3, H, W]`` to 8 bits, write it with Pillow as JPEG of quality `_JPEG` and read it again."""
    file = io.BytesIO()
    tv.to_pil_image((image * 255).round().to(torch.uint8)).save(file, "JPEG", quality=_JPEG[severity - 1])
    with Image.open(file) as opened:
        return tv.pil_to_tensor(opened).float() / 255


def _smooth_noise(size: tuple[int, int], rng: np.random.Generator, sigma: float) -> Tensor:
    """``[H, W]``: uniform noise in [-1, 1], smoothed by a Gaussian of ``sigma`` pixels."""

    def gain(vertical: Tensor, horizontal: Tensor) -> Tensor:
        return torch.exp(-2 * (math.pi * sigma) ** 2 * (vertical**2 + horizontal**2))

    # Smoothing makes it normal, so normal noise of the same deviation does as well.
    return random_field(size, rng, gain) / math.sqrt(3)
