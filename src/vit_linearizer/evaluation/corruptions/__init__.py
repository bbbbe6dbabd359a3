"""Pictures spoilt in 15 ways at five severities: what robustness to a shift of distribution is measured on.

Source: the kinds, their order and their severities are those of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261);
each severity table stands beside its operator in noise, blur, weather and digital. It gives values for
pictures of 224 pixels. Here lengths in pixels are multiplied by ``min(H, W) / 224`` (`parts`), which is a choice;
noise is per pixel, ``pixelate`` keeps a share of the picture's own pixels, and JPEG's blocks have 8x8 of them, at any size.

Accuracies on these pictures are not comparable with published ImageNet-C ones. They serve to compare models with each
other. ImageNet-C is a fixed set of JPEG files, made with photographs of frost and with other operators for motion, glass
and fog. Here every layer is drawn from random numbers alone, and the result is neither rounded to 8 bits nor compressed
(except by ``jpeg_compression``, which does both).

With these tables, severity is not distance: the elastic transform moves pixels further at 1 and 2 than at 3 to 5, and
frost and fog hide more edges from 3 on but hardly move the values any further.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...contracts import UserError, did_you_mean
from .blur import defocus_blur, glass_blur, motion_blur, zoom_blur
from .digital import contrast, elastic_transform, jpeg_compression, pixelate
from .noise import gaussian_noise, impulse_noise, shot_noise
from .weather import brightness, fog, frost, snow

#: One picture ``[3, H, W]`` in fp32, a severity and its own random numbers -> the spoilt picture, not yet clipped.
_OPERATORS: dict[str, Callable[[Tensor, int, np.random.Generator], Tensor]] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "snow": snow,
    "frost": frost,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic_transform": elastic_transform,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
}

KINDS: tuple[str, ...] = tuple(_OPERATORS)
SEVERITIES = (1, 2, 3, 4, 5)

_SMALLEST_SIDE = 8


def corrupt(images: Tensor, kind: str, severity: int, numbers: Sequence[int]) -> Tensor:
    """Spoil every picture of a batch, each with random numbers of its own.

    What happens to a picture is a function of the picture and (kind, severity, number) alone: not of its batch, of the
    process, or of any global generator, none of which is touched. Computed picture by picture, on the CPU, in fp32.

    Args:
        images: ``[B, 3, H, W]`` floats in [0, 1], red, green, blue; sides of 8 pixels or more.
        kind: one of `KINDS`.
        severity: 1 (mild) to 5.
        numbers: ``B`` whole numbers from 0, the names of the pictures, such as their places in the data.

    Returns:
        ``[B, 3, H, W]`` in [0, 1], of the same dtype and on the same device.

    Raises:
        UserError: unknown kind or severity.
        ValueError: the images have another form, or there are not as many numbers as images.
    """
    if kind not in _OPERATORS:
        raise UserError("corruption", kind, f"choose from {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    if severity not in SEVERITIES:
        raise UserError("severity", severity, f"choose from {', '.join(map(str, SEVERITIES))}")
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < _SMALLEST_SIDE or not images.is_floating_point():
        form = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"images are {form}; give floats [B, 3, H, W] with sides of {_SMALLEST_SIDE} pixels or more")
    if len(numbers) != len(images):
        raise ValueError(f"{len(numbers)} numbers for {len(images)} images")
    spoilt = torch.empty_like(images)
    with torch.no_grad():
        for place, number in enumerate(numbers):
            rng = np.random.default_rng([*kind.encode(), severity, int(number)])
            picture = images[place].detach().to("cpu", torch.float32)
            spoilt[place] = _OPERATORS[kind](picture, severity, rng).clamp(0, 1)
    return spoilt
