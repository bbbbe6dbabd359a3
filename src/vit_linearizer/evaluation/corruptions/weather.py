"""Snow, frost, fog and brighter light.

Source: ImageNet-C (arXiv 1903.12261): its ways of laying a layer over the picture, and its tables. Choices, for what cannot
be had without its files or its operators, all drawn in the 224-pixel frame of `parts`:

- snow: its noise, threshold and blur, with our motion kernel for ImageMagick's.
- frost: needles of ice along zero lines of random fields, for its photographs.
- fog: a random field of spectrum ``f ** -(1 + log2(decay))``, which is as rough as the plasma fractal whose steps shrink by
  ``decay`` from one level to the next.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from .parts import convolve, fit, frame, motion_kernel, random_field, to_unit

#: (mean and deviation of the noise, zoom, threshold, radius and deviation of the movement, share of the picture).
_SNOW = (
    (0.1, 0.3, 3.0, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2.0, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4.0, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
#: (weight of the picture, weight of the ice).
_FROST = ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
#: (weight of the fog, decay).
_FOG = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))
#: Added to the value of hue, saturation and value.
_BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)

#: Snow falls within 45 degrees of the vertical.
_SNOW_ANGLES = (-135, -45)
#: Of the ice, all choices: directions of needles, their length over their width, their sharpness, and the colour.
_NEEDLES, _ELONGATION, _SHARPNESS, _ICE_COLOUR = 5, 5.0, 0.35, (0.86, 0.94, 1.0)


def snow(image: Tensor, severity: int, rng: np.random.Generator) -> Tensor:
    """Whiten ``[3, H, W]`` and add moving flakes, the same ones once more turned by half a turn."""
    mean, deviation, zoom, threshold, radius, sigma, keep = _SNOW[severity - 1]
    height, width = frame(image)
    coarse = [math.ceil(height / zoom), math.ceil(width / zoom)]
    noise = torch.from_numpy(rng.normal(mean, deviation, coarse).astype(np.float32))
    flakes = F.interpolate(noise[None, None], (height, width), mode="bilinear", align_corners=True)[0]
    flakes = torch.where(flakes < threshold, 0, flakes).clamp(0, 1)
    flakes = fit(convolve(flakes, motion_kernel(2 * radius, sigma, rng.uniform(*_SNOW_ANGLES))), image).clamp(0, 1)
    whitened = torch.maximum(image, 1.5 * tv.rgb_to_grayscale(image) + 0.5)
    return keep * image + (1 - keep) * whitened + flakes + flakes.rot90(2, (1, 2))


def frost(image: Tensor, severity: int, rng: np.random.Generator) -> Tensor:
    """The weighted sum of ``[3, H, W]`` and of a sheet of ice, `_FROST`."""
    keep, weight = _FROST[severity - 1]
    return keep * image + weight * fit(_ice(frame(image), rng), image)


def fog(image: Tensor, severity: int, rng: np.random.Generator) -> Tensor:
    """Add fog of weight `_FOG` to ``[3, H, W]`` and bring the sum back to the picture's largest value."""
    weight, decay = _FOG[severity - 1]
    brightest = image.max()
    layer = fit(to_unit(_power_field(frame(image), rng, 1 + math.log2(decay)))[None], image)
    return (image + weight * layer) * brightest / (brightest + weight)


def brightness(image: Tensor, severity: int, rng: np.random.Generator) -> Tensor:  # noqa: ARG001
    """Add `_BRIGHTNESS` to the value (of hue, saturation, value) of ``[3, H, W]``, up to 1; black becomes grey."""
    value = image.amax(0, keepdim=True)
    brighter = (value + _BRIGHTNESS[severity - 1]).clamp_max(1)
    # With hue and saturation kept, red, green and blue are in proportion to the value.
    return torch.where(value > 0, image * (brighter / value.clamp_min(1e-12)), brighter)


def _power_field(
    size: tuple[int, int], rng: np.random.Generator, power: float, *, angle: float = 0.0, elongation: float = 1.0
) -> Tensor:
    """``[H, W]`` noise of amplitude ``f ** -power``, its grain longer by ``elongation`` along ``angle``."""

    def gain(vertical: Tensor, horizontal: Tensor) -> Tensor:
        along = elongation * (horizontal * math.cos(angle) + vertical * math.sin(angle))
        across = vertical * math.cos(angle) - horizontal * math.sin(angle)
        # The frequency 0 has no power; it only moves the mean.
        return (along**2 + across**2).sqrt().clamp_min(1 / max(size)) ** -power

    return random_field(size, rng, gain)


def _ice(size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """A sheet of ice ``[3, h, w]`` in [0, 1]: needles in several directions, thick in places."""
    sheet = torch.zeros(size)
    for angle in math.pi * (rng.random() + np.arange(_NEEDLES)) / _NEEDLES:
        field = _power_field(size, rng, 1.3, angle=float(angle), elongation=_ELONGATION)
        patches = to_unit(_power_field(size, rng, 1.8))
        sheet = torch.maximum(sheet, patches * torch.exp(-((field - field.mean()) / field.std()).abs() / _SHARPNESS))
    return to_unit(sheet.sqrt()) * torch.tensor(_ICE_COLOUR).reshape(3, 1, 1)
