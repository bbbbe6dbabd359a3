"""What a model is shown of a picture: crops, flips and colours, and the patches that are hidden.

Source: ThreeAugment of DeiT-III (arXiv 2204.07118), through timm's ``3a`` policy: a random resized crop, a flip, one of
grey, solarised or blurred, and colour jitter 0.3; its colours can be left to the training device, see
device_augmentation.py. RandAugment (arXiv 1909.13719) is timm's too. Every random choice depends on (seed, epoch, picture,
repeat) alone.
"""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment, posterize
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, RandomAffine

from ..contracts import UserError
from ..objectives import Masking, sample_mask
from .device_augmentation import draw_colours
from .sampler import Draw

Augmentation = Literal["three", "rand", "crop", "affine", "none"]


#: timm's names.
_POLICIES = {"three": "3a", "rand": "rand-m9-mstd0.5-inc1"}
#: Of ``affine``: degrees, and shares of the picture's side.
_TURN, _SHIFT, _ZOOM = 12, 0.1, 0.1


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How a picture becomes a training view.

    Attributes:
        augmentation: ``three`` (ThreeAugment), ``rand`` (RandAugment as timm's rand-m9-mstd0.5-inc1), ``crop`` (crop and
            flip alone), ``affine`` (small turns, shifts and zooms, for pictures such as digits that a crop or a mirror
            would turn into something else) or ``none`` (the centre).
        smallest_crop: smallest share of the picture's area that a crop keeps.
        horizontal_flip: probability of a mirror image.
        repeats: draws of a picture in a row (repeated augmentation).
        device_augmentation: with ``three``: the loader draws the colours, and the training device computes them.
    """

    augmentation: Augmentation = "three"
    smallest_crop: float = 0.08
    horizontal_flip: float = 0.5
    repeats: int = 3
    device_augmentation: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.smallest_crop <= 1:
            raise UserError("--smallest-crop", self.smallest_crop, "must be in (0, 1]")
        if not 0 <= self.horizontal_flip <= 1:
            raise UserError("--horizontal-flip", self.horizontal_flip, "must be in [0, 1]")
        if self.repeats < 1:
            raise UserError("--repeats", self.repeats, "must be at least 1")
        if self.device_augmentation and self.augmentation != "three":
            by_picture = "is computed picture by picture, which the loader does"
            why = by_picture if self.augmentation == "rand" else "changes no colours"
            remedy = f"{why}; use --augmentation three, or leave --device-augmentation out"
            raise UserError("--augmentation", self.augmentation, remedy)

    @property
    def colours_in_loader(self) -> bool:
        """Whether the loader computes what the training device could."""
        return self.augmentation == "three" and not self.device_augmentation


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which patches are hidden: the student's grid, the share, and how they are drawn; see `objectives.sample_mask`."""

    grid: tuple[int, int]
    ratio: float
    masking: Masking


class TrainingView:
    """Picture and draw -> the view, the same for the same draw in any process.

    A dict: ``images``, uint8 ``[3, H, W]``; with a mask config ``mask``; with `ViewConfig.device_augmentation` ``colours``,
    the row of `draw_colours` that `to_device` applies. Crop, flip and colours are those that the draw has without it.
    """

    def __init__(self, image_size: tuple[int, int], config: ViewConfig, mask: MaskConfig | None, *, seed: int):
        self.seed = seed
        self.mask = mask
        self.draws_colours = config.device_augmentation
        if config.augmentation in ("none", "affine"):
            self.transform = centre_transform(image_size)
            if config.augmentation == "affine":
                affine = RandomAffine(
                    _TURN, (_SHIFT, _SHIFT), (1 - _ZOOM, 1 + _ZOOM), interpolation=InterpolationMode.BILINEAR
                )
                self.transform = Compose([affine, self.transform])
            return
        self.transform = create_transform(
            input_size=image_size,
            is_training=True,
            scale=(config.smallest_crop, 1.0),
            hflip=config.horizontal_flip,
            auto_augment=None if config.device_augmentation else _POLICIES.get(config.augmentation),
            color_jitter=0.3 if config.colours_in_loader else None,  # type: ignore[arg-type]  # timm takes None
            interpolation="bicubic",
            normalize=False,
        )
        for step in self.transform.transforms:
            for operation in step.ops if isinstance(step, RandAugment) else ():
                if operation.aug_fn is posterize:
                    operation.aug_fn = _posterize

    def __call__(self, image: Image.Image, draw: Draw) -> dict[str, Tensor]:
        with seeded(self.seed, *draw):
            view = {"images": self.transform(image)}
            if self.draws_colours:  # after crop and flip, and so from where the colours of `_POLICIES` would begin to draw
                view["colours"] = draw_colours()
        if self.mask is not None:
            rng = np.random.default_rng([self.seed, *draw, 1])
            view["mask"] = torch.from_numpy(sample_mask(self.mask.grid, self.mask.ratio, self.mask.masking, rng))
        return view


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """timm's, but never to 0 bits, which its noise on the magnitude asks for now and then and Pillow refuses."""
    return posterize(image, max(1, bits), **kwargs)


def centre_transform(image_size: tuple[int, int]) -> Any:
    """Resize to cover the image size and cut the centre: uint8 ``[3, H, W]``, the view of every evaluation."""
    return create_transform(input_size=image_size, is_training=False, crop_pct=1.0, interpolation="bicubic", normalize=False)


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the generators that timm's and torchvision's transforms draw from, and give them back as they were."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    first, second, third = (int(word) for word in np.random.SeedSequence(key).generate_state(3))
    random.seed(first)
    np.random.seed(second)
    torch.default_generator.manual_seed(third)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
