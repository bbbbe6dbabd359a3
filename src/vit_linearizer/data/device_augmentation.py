"""The colours of ThreeAugment for a whole batch at once, on the device that trains.

Source: ThreeAugment of DeiT-III (arXiv 2204.07118) as timm's ``3a`` policy and torchvision's ``ColorJitter`` have it: one of
solarised (from 128 on), grey and blurred (deviation 0.1 to 2 pixels), then brightness, contrast and saturation by factors of
0.7 to 1.3 in any order. The loader draws the numbers (`draw_colours`), the device computes with them (`apply_colours`).
It must equal what timm's transform makes of the same draw in a loader's process, but for two choices. Values stay floats and
are clamped to [0, 1] after each operation, where Pillow goes back to whole levels of 1/255, dropping the rest in mixtures:
its pictures are about one level darker. A blur goes on beyond an edge once, where Pillow does so before each of its boxes.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import ColorJitter

#: Which of three; numbered as in timm's policy, so that the same random number picks the same one.
SOLARISED, GREY, BLURRED = range(3)
#: Deviation of the blur, in pixels; timm's ``gaussian_blur_rand``.
_BLUR = (0.1, 2.0)
#: Of brightness, contrast and saturation: ``ColorJitter(0.3, 0.3, 0.3)``.
_FACTORS = [1 - 0.3, 1 + 0.3]
#: Between the grey values 127 and 128.
_SOLARISE_FROM = 127.5 / 255
#: Pillow's weights of red, green and blue in a grey value.
_LUMA = (0.299, 0.587, 0.114)
#: Pillow blurs by so many boxes in a row; with deviations of up to 2 none reaches further than two pixels to each side.
_BOXES, _BOX_REACH = 3, 2

# Columns of a row of colours: which of three, the blur's deviation (0 for none), the factors of brightness, contrast and
# saturation, and then these three numbered 0 to 2 in the order in which they come.
_CHANGE, _DEVIATION, _FACTOR, _ORDER = 0, 1, slice(2, 5), slice(5, 8)
_BRIGHTNESS, _CONTRAST = 0, 1


def draw_colours() -> Tensor:
    """The colours of one view, for `apply_colours`.

    They come from Python's and torch's global generators, by the same calls in the same order as timm's and torchvision's
    transforms make. A caller who seeds both gets the colours that those transforms would have given the picture.

    Returns:
        ``[8]``, float32: which of three, the blur's deviation in pixels, three factors, and their order.
    """
    change = random.choice((SOLARISED, GREY, BLURRED))
    deviation = random.uniform(*_BLUR) if change == BLURRED else 0.0
    order, brightness, contrast, saturation, _ = ColorJitter.get_params(_FACTORS, _FACTORS, _FACTORS, None)
    in_turn = [float(number) for number in order.tolist() if number < 3]  # the fourth is hue, which stays
    factors = (brightness, contrast, saturation)
    return torch.tensor([change, deviation, *(1.0 if factor is None else factor for factor in factors), *in_turn])


def apply_colours(images: Tensor, colours: Tensor) -> Tensor:
    """Give each picture of a batch its colours.

    Args:
        images: ``[B, 3, H, W]``, float in [0, 1], on any device; not changed.
        colours: ``[B, 8]``, a row of `draw_colours` for each picture. Best left on the CPU: only there can be asked
            which pictures are blurred without waiting for the device.

    Returns:
        ``[B, 3, H, W]`` in [0, 1].
    """
    # A GPU works behind the host; asking it for a number (.item(), a boolean index) would stop the host until it has caught
    # up, in every step. So shapes depend on `colours` as the host has them, and the rest chooses by torch.where.
    blurred = (colours[:, _CHANGE] == BLURRED).nonzero().flatten()
    kernels = _blur_kernels(colours[blurred, _DEVIATION])
    colours, blurred, kernels = (tensor.to(images.device, non_blocking=True) for tensor in (colours, blurred, kernels))

    change = colours[:, _CHANGE].view(-1, 1, 1, 1)
    solarised = torch.where(images > _SOLARISE_FROM, 1 - images, images)
    coloured = torch.where(change == SOLARISED, solarised, torch.where(change == GREY, _grey(images), images))
    if len(blurred):
        coloured.index_copy_(0, blurred, _blur(images.index_select(0, blurred), kernels))

    order = colours[:, _ORDER].long()
    factors = colours[:, _FACTOR].gather(1, order)
    for turn in range(order.shape[1]):
        which, factor = order[:, turn].view(-1, 1, 1, 1), factors[:, turn].view(-1, 1, 1, 1)
        # Each of the three is a mixture, or its continuation, of the picture with one that lacks something.
        grey = _grey(coloured)
        without = torch.where(which == _CONTRAST, grey.mean(dim=(2, 3), keepdim=True), grey)
        without = torch.where(which == _BRIGHTNESS, 0.0, without)
        coloured = torch.lerp(without, coloured, factor).clamp_(0, 1)
    return coloured


def _grey(images: Tensor) -> Tensor:
    """``[B, 3, H, W]`` -> ``[B, 1, H, W]``."""
    red, green, blue = images.unbind(1)
    return (red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]).unsqueeze(1)


def _blur_kernels(deviations: Tensor) -> Tensor:
    """Deviations ``[B]`` -> kernels ``[B, 13]``: three boxes with fractional edges in a row, Pillow's way to a Gaussian.

    A Gaussian sampled at whole pixels would hardly blur at all below half a pixel, and Pillow does. The length of a box is
    that of Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering" (2011).
    """
    variance = deviations**2 / _BOXES
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    distance = torch.arange(-_BOX_REACH, _BOX_REACH + 1, device=deviations.device).abs()
    box = ((whole + part)[:, None] + 1 - distance).clamp(0, 1)
    box = box / box.sum(dim=1, keepdim=True)
    if not len(box):
        return box.new_zeros(0, 2 * _BOXES * _BOX_REACH + 1)
    kernels = box[None]
    for _ in range(_BOXES - 1):
        kernels = F.conv1d(kernels, box[:, None], padding=2 * _BOX_REACH, groups=len(box))
    return kernels[0]


def _blur(images: Tensor, kernels: Tensor) -> Tensor:
    """``[B, 3, H, W]`` by a kernel each, ``[B, K]``, across and down; beyond an edge its last pixels go on, as in Pillow."""
    reach = kernels.shape[1] // 2
    planes = F.pad(images, (reach,) * 4, mode="replicate").flatten(0, 1)[None]
    weights = kernels.repeat_interleave(images.shape[1], dim=0)
    across = F.conv2d(planes, weights[:, None, None, :], groups=len(weights))
    down = F.conv2d(across, weights[:, None, :, None], groups=len(weights))
    return down[0].unflatten(0, images.shape[:2])
