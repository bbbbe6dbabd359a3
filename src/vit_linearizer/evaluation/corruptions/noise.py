"""Noise of a sensor: Gaussian, of counted photons, and of dead pixels.

Source: ImageNet-C (arXiv 1903.12261), its formulas and tables. Every value of the picture has noise of its own; the noise
does not depend on the picture's size.
"""

import numpy as np
import torch
from torch import Tensor

#: Deviation.
_GAUSSIAN = (0.08, 0.12, 0.18, 0.26, 0.38)
#: Photons that make a value of 1.
_PHOTONS = (60, 25, 12, 5, 3)
#: Share of the values that are lost.
_IMPULSE = (0.03, 0.06, 0.09, 0.17, 0.27)


def gaussian_noise(image: Tensor, severity: int, rng: np.random.Generator) -> Tensor:
    """Add normal noise of deviation `_GAUSSIAN` to ``[3, H, W]``."""
    return image + _GAUSSIAN[severity - 1] * torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))


def shot_noise(image: Tensor, severity: int, rng: np.random.Generator) -> Tensor:
    """Replace each value of ``[3, H, W]`` by a Poisson count of that mean, `_PHOTONS` to a value of 1."""
    photons = _PHOTONS[severity - 1]
    counts = rng.poisson(image.clamp_min(0).numpy().astype(np.float64) * photons)
    return torch.from_numpy((counts / photons).astype(np.float32))


def impulse_noise(image: Tensor, severity: int, rng: np.random.Generator) -> Tensor:
    """Set a share `_IMPULSE` of the values of ``[3, H, W]`` to 0 or 1, with equal chance."""
    chance = torch.from_numpy(rng.random(image.shape, dtype=np.float32))
    share = _IMPULSE[severity - 1]
    return torch.where(chance < share, (chance < share / 2).float(), image)
