"""What a segmentation model is shown: a picture and its mask, resized, cut, mirrored and coloured together.

Source: the recipe that UperNet (Xiao et al., arXiv 1807.10221) and Swin (arXiv 2103.14030) are trained with on ADE20K: the
short side brought to the crop's, times a scale drawn evenly from 0.5 to 2; a random crop of which no class fills more than
three quarters; a mirror; photometric distortion of SSD (arXiv 1512.02325) without its permutation of channels. A choice:
padding with black at the right and the bottom, after the colours.

Picture and mask are sampled at the same points: a pixel of the mask is the class at its centre.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from ...contracts import UserError
from ..sampler import Draw
from ..views import seeded
from .masks import IGNORED

#: Crops drawn anew where one class fills too much, as in the recipe.
_TRIES = 10

#: Long side over the crop's short side at most, before the random scale: the recipe's 2048 for 512.
_LONGEST = 4


@dataclass(frozen=True, kw_only=True)
class SegmentationViewConfig:
    """How a picture and its mask become a training view.

    Attributes:
        scales: least and greatest factor on the fitted size, drawn evenly between them.
        horizontal_flip: probability of a mirror image.
        colour: photometric distortion of the picture.
        largest_class_share: a crop where one class has more than this share of the pixels that count is drawn again, up
            to ten times; 1 takes every crop.
    """

    scales: tuple[float, float] = (0.5, 2.0)
    horizontal_flip: float = 0.5
    colour: bool = True
    largest_class_share: float = 0.75

    def __post_init__(self) -> None:
        smallest, largest = self.scales
        if not 0 < smallest <= largest < math.inf:
            raise UserError("--scales", f"{smallest} {largest}", "must be two numbers above 0, the smaller one first")
        if not 0 <= self.horizontal_flip <= 1:
            raise UserError("--horizontal-flip", self.horizontal_flip, "must be in [0, 1]")
        if not 0 < self.largest_class_share <= 1:
            raise UserError("--largest-class-share", self.largest_class_share, "must be in (0, 1]")


class SegmentationView:
    """Picture, mask and draw -> a training view of both, the same for the same draw in any process.

    Args:
        crop: (height, width) of every view, in pixels.
        config: the augmentation.
        resize: the source's fixed (height, width), or None to fit the short side to the crop's.
        seed: of the run.

    Raises:
        UserError: a crop without pixels.
    """

    def __init__(self, crop: tuple[int, int], config: SegmentationViewConfig, *, resize: tuple[int, int] | None, seed: int):
        if min(crop) < 1:
            raise UserError("--crop", f"{crop[0]}x{crop[1]}", "must be at least 1x1")
        self.crop, self.config, self.resize, self.seed = crop, config, resize, seed
        jitters = (
            {"brightness": (0.875, 1.125)},
            {"contrast": (0.5, 1.5)},
            {"saturation": (0.5, 1.5)},
            {"hue": (-0.05, 0.05)},
        )
        self.colour = v2.Compose([v2.RandomApply([v2.ColorJitter(**jitter)], p=0.5) for jitter in jitters])

    def __call__(self, image: Image.Image, mask: np.ndarray, draw: Draw) -> dict[str, Tensor]:
        """A view.

        Args:
            image: RGB.
            mask: ``[H, W]`` uint8 class numbers, as large as the image.
            draw: which use of the picture this is.

        Returns:
            ``images`` uint8 ``[3, h, w]`` and ``masks`` uint8 ``[h, w]`` of the crop's size; beyond the picture 0 and 255.
        """
        with seeded(self.seed, *draw):
            return self._view(image, mask)

    def _view(self, image: Image.Image, mask: np.ndarray) -> dict[str, Tensor]:
        scale = torch.empty(()).uniform_(*self.config.scales).item()
        height, width = fitted_size((image.height, image.width), self.crop, self.resize)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        # Plain "nearest" reads the corner of a pixel, not its centre, and would shift the mask against the picture.
        labels = F.resize(torch.from_numpy(mask)[None], list(size), InterpolationMode.NEAREST_EXACT)
        box = self._box(labels, size)
        pixels = F.crop(_resized(image, size), *box)
        labels = F.crop(labels, *box)
        if torch.rand(()) < self.config.horizontal_flip:
            pixels, labels = F.horizontal_flip(pixels), F.horizontal_flip(labels)
        if self.config.colour:
            pixels = self.colour(pixels)
        missing = [0, 0, self.crop[1] - box[3], self.crop[0] - box[2]]
        return {"images": F.pad(pixels, missing, fill=0), "masks": F.pad(labels, missing, fill=IGNORED)[0]}

    def _box(self, labels: Tensor, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Top, left, height and width of a random part of the picture, no larger than the crop."""
        height, width = min(self.crop[0], size[0]), min(self.crop[1], size[1])
        for _ in range(1 + _TRIES):
            top = int(torch.randint(size[0] - height + 1, ()))
            left = int(torch.randint(size[1] - width + 1, ()))
            counts = torch.bincount(F.crop(labels, top, left, height, width).flatten(), minlength=256)[:IGNORED]
            # A crop where nothing counts is as little use as one of a single class.
            if counts.sum() and counts.max() <= self.config.largest_class_share * counts.sum():
                break
        return top, left, height, width


def fitted_size(size: tuple[int, int], crop: tuple[int, int], resize: tuple[int, int] | None) -> tuple[int, int]:
    """What a picture is resized to, before any random scale.

    Args:
        size: (height, width) of the picture, in pixels.
        crop: (height, width) of the views.
        resize: the source's fixed (height, width), or None.

    Returns:
        ``resize``, or the size of the same aspect, rounded to whole pixels, whose short side is the crop's short side; of a
        picture longer than four to one, whose long side is four times that.
    """
    if resize is not None:
        return resize
    factor = min(min(crop) / min(size), _LONGEST * min(crop) / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def evaluation_view(image: Image.Image, crop: tuple[int, int], resize: tuple[int, int] | None) -> Tensor:
    """A whole picture as an evaluation sees it; its mask keeps its own size, and predictions are brought to that.

    Args:
        image: RGB.
        crop: (height, width) that the model was trained on, in pixels.
        resize: the source's fixed (height, width), or None to fit the short side to the crop's.

    Returns:
        uint8 ``[3, h, w]`` of `fitted_size`.
    """
    return _resized(image, fitted_size((image.height, image.width), crop, resize))


def _resized(image: Image.Image, size: tuple[int, int]) -> Tensor:
    return F.resize(F.pil_to_tensor(image), list(size), InterpolationMode.BILINEAR, antialias=True)
