"""What several corruptions are made of: the 224-pixel frame, blurring, displaced pixels, and random fields.

A choice, where ImageNet-C (arXiv 1903.12261) has 224-pixel pictures only: lengths in pixels are multiplied by
``min(H, W) / 224``, and textures are drawn in a frame whose short side is 224 pixels and then resized. A picture is then
harmed about as much as it would be at 224 pixels. Kernels share their points bilinearly among pixels, so that lengths below
one pixel count as well.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

REFERENCE = 224

#: Points along a path of motion; enough for a path of 80 pixels.
_PATH_POINTS = 257


def scale(image: Tensor) -> float:
    """Pixels of this picture ``[..., H, W]`` for one pixel of a 224-pixel picture."""
    return min(image.shape[-2:]) / REFERENCE


def frame(image: Tensor) -> tuple[int, int]:
    """(height, width) of the picture's shape with a short side of 224 pixels, in which textures are drawn."""
    height, width = image.shape[-2:]
    return round(height / scale(image)), round(width / scale(image))


def fit(layer: Tensor, image: Tensor) -> Tensor:
    """Resize layers ``[C, h, w]`` to the picture's height and width."""
    return tv.resize(layer, list(image.shape[-2:]), antialias=True)


def kernel_from_points(rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> Tensor:
    """A blurring kernel from weighted points.

    Args:
        rows: ``[P]`` offsets from the centre, in pixels.
        columns: ``[P]`` offsets from the centre, in pixels.
        weights: ``[P]``, of any positive sum.

    Returns:
        ``[2r+1, 2r+1]`` of sum 1, every point shared bilinearly among its four pixels.
    """
    radius = int(max(np.abs(rows).max(), np.abs(columns).max())) + 1
    side = 2 * radius + 1
    top, left = np.floor(rows).astype(np.int64), np.floor(columns).astype(np.int64)
    kernel = np.zeros(side * side)
    for down in (0, 1):
        for right in (0, 1):
            share = (1 - np.abs(rows - top - down)) * (1 - np.abs(columns - left - right)) * weights
            place = (top + down + radius) * side + left + right + radius
            # A share of nothing may fall outside of the kernel.
            kernel += np.bincount(place[share > 0], share[share > 0], minlength=side * side)
    return torch.from_numpy(kernel / kernel.sum()).float().reshape(side, side)


def motion_kernel(length: float, sigma: float, angle: float) -> Tensor:
    """The kernel of a movement that fades: a Gaussian's falling half, along a line from the centre.

    Args:
        length: of the line, in pixels.
        sigma: deviation of the Gaussian, in pixels.
        angle: of the line, in degrees from the right, downwards.

    Returns:
        A kernel as of `kernel_from_points`.
    """
    along = np.linspace(0, length, _PATH_POINTS)
    direction = math.radians(angle)
    return kernel_from_points(along * math.sin(direction), along * math.cos(direction), np.exp(-0.5 * (along / sigma) ** 2))


def convolve(image: Tensor, kernel: Tensor) -> Tensor:
    """Convolve ``[C, H, W]`` with a kernel ``[2r+1, 2r+1]``, by Fourier transform; edge pixels are repeated outside."""
    radius, (height, width) = len(kernel) // 2, image.shape[-2:]
    padded = F.pad(image, [radius] * 4, mode="replicate")
    size = padded.shape[-2:]
    # Rows wrap round only beyond the padding, which is cut off.
    response = torch.fft.rfft2(F.pad(kernel, [0, size[1] - len(kernel), 0, size[0] - len(kernel)]))
    blurred = torch.fft.irfft2(torch.fft.rfft2(padded) * response, s=size)
    return blurred[..., 2 * radius : 2 * radius + height, 2 * radius : 2 * radius + width]


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Blur ``[C, H, W]`` by torchvision's Gaussian of ``sigma`` pixels, cut at four deviations."""
    side = 2 * max(1, math.ceil(4 * sigma)) + 1
    return tv.gaussian_blur(image, [side, side], [sigma, sigma])


def pixel_places(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and column of every pixel, ``[H, W]`` each, in pixels from the centre of the first."""
    rows, columns = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    return rows, columns


def look_up(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Read a picture at other places, bilinearly; beyond its edges it is mirrored.

    Args:
        image: ``[C, H, W]``.
        rows: ``[N, H, W]``, where each output pixel is read, in pixels.
        columns: ``[N, H, W]``.

    Returns:
        ``[N, C, H, W]``.
    """
    height, width = image.shape[-2:]
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1)
    repeated = image.expand(len(rows), *image.shape)
    return F.grid_sample(repeated, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def random_field(size: tuple[int, int], rng: np.random.Generator, gain: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """White noise whose spectrum is given a form; opposite edges meet.

    Args:
        size: (height, width).
        rng: where the noise, of deviation 1, comes from.
        gain: (vertical, horizontal) frequencies, in periods per pixel -> factor of the amplitude; both arguments broadcast.

    Returns:
        ``[H, W]``.
    """
    noise = torch.from_numpy(rng.standard_normal(size, dtype=np.float32))
    factors = gain(torch.fft.fftfreq(size[0])[:, None], torch.fft.rfftfreq(size[1]))
    return torch.fft.irfft2(torch.fft.rfft2(noise) * factors, s=size)


def to_unit(field: Tensor) -> Tensor:
    """Shift and stretch a field so that it goes from 0 to 1."""
    low, high = field.aminmax()
    return (field - low) / (high - low)
