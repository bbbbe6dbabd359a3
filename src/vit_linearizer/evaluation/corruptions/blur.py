"""Blur of a lens, of frosted glass, of movement and of zooming.

Source: ImageNet-C (arXiv 1903.12261), whose tables stand here; radii, deviations and displacements are in pixels of a
224-pixel picture and are scaled (`parts`). Choices: edge pixels are repeated, or mirrored, outside; the disc of the
lens has soft edges at every size; glass moves all pixels at once where ImageNet-C exchanges neighbours one after the other.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .parts import convolve, gaussian_blur, kernel_from_points, look_up, motion_kernel, pixel_places, scale

#: (radius of the disc, deviation of the Gaussian that softens it).
_DEFOCUS = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))
#: (deviation of the blur before and after, largest displacement, times that pixels are displaced).
_GLASS = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
#: (radius, deviation): the movement is two radii and fades with the deviation, as ImageMagick's motion blur.
_MOTION = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
#: (number of zooms, step between them), from a zoom of 1.
_ZOOM = ((11, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03))

_MOTION_ANGLE = 45
#: Points across the disc.
_DISC_POINTS = 129


def defocus_blur(image: Tensor, severity: int, rng: np.random.Generator) -> Tensor:  # noqa: ARG001
    """Convolve ``[3, H, W]`` with a soft disc of radius `_DEFOCUS`."""
    radius, softness = (scale(image) * value for value in _DEFOCUS[severity - 1])
    across = np.linspace(-radius, radius, _DISC_POINTS)
    rows, columns = (points.ravel() for points in np.meshgrid(across, across))
    inside = (rows**2 + columns**2 <= radius**2).astype(np.float64)
    disc = kernel_from_points(rows, columns, inside)
    margin = int(4 * softness) + 2
    disc = gaussian_blur(F.pad(disc, [margin] * 4)[None], softness)[0]
    return convolve(image, disc / disc.sum())


def glass_blur(image: Tensor, severity: int, rng: np.random.Generator) -> Tensor:
    """Blur ``[3, H, W]``, read every pixel from a random near place, `_GLASS` times over, and blur again."""
    sigma, furthest, times = _GLASS[severity - 1]
    image = gaussian_blur(image, scale(image) * sigma)
    rows, columns = pixel_places(*image.shape[-2:])
    for _ in range(times):
        moves = scale(image) * torch.from_numpy(rng.integers(-furthest, furthest, (2, *rows.shape), endpoint=True)).float()
        image = look_up(image, (rows + moves[0])[None], (columns + moves[1])[None])[0]
    return gaussian_blur(image, scale(image) * sigma)


def motion_blur(image: Tensor, severity: int, rng: np.random.Generator) -> Tensor:
    """Smear ``[3, H, W]`` along a line within 45 degrees of the horizontal; `_MOTION` says how far."""
    radius, sigma = _MOTION[severity - 1]
    angle = rng.uniform(-_MOTION_ANGLE, _MOTION_ANGLE)
    return convolve(image, motion_kernel(scale(image) * 2 * radius, scale(image) * sigma, angle))


def zoom_blur(image: Tensor, severity: int, rng: np.random.Generator) -> Tensor:  # noqa: ARG001
    """The mean of ``[3, H, W]`` and of its enlargements about the centre, `_ZOOM`; the picture itself counts twice."""
    number, step = _ZOOM[severity - 1]
    zooms = (1 + step * torch.arange(number)).reshape(-1, 1, 1)
    height, width = image.shape[-2:]
    middle_row, middle_column = (height - 1) / 2, (width - 1) / 2
    rows, columns = pixel_places(height, width)
    enlarged = look_up(image, (rows - middle_row) / zooms + middle_row, (columns - middle_column) / zooms + middle_column)
    return (image + enlarged.sum(0)) / (number + 1)
