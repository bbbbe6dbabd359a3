"""A backbone with a segmentation head: images in [0, 1] -> a score for every class at every pixel.

Sources: UperNet (arXiv 1807.10221) over four blocks of a plain backbone, as the public BEiT segmentation recipe has it; or a
linear head (BatchNorm and a 1x1 convolution on the same four blocks, concatenated), which says what the patch tokens hold.
Block outputs are read raw, before the final norm, so parameters behind the last block have no part in it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..contracts import UserError, did_you_mean
from .adapters import check_plain, nominal_size, normalize, patch_size
from .layer_groups import layers_below
from .upernet import Pyramid, init_convolutions, upernet_heads

Head = Literal["upernet", "linear"]
HEADS: tuple[Head, ...] = ("upernet", "linear")

#: Where the state dict and the parameter names have the backbone.
BACKBONE = "backbone."


class SegmenterOutput(NamedTuple):
    """What a `Segmenter` says of a batch.

    Attributes:
        logits: ``[B, C, H, W]`` at the images' own size.
        auxiliary: the same from the auxiliary head, in training with UperNet; else None.
    """

    logits: Tensor
    auxiliary: Tensor | None


def tap_blocks(depth: int) -> tuple[int, int, int, int]:
    """0-based blocks that the head reads: ``round(depth * (1/3, 1/2, 2/3, 1)) - 1``.

    That is 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24, as in public BEiT-style recipes; for other depths a choice.

    Args:
        depth: number of blocks.

    Raises:
        UserError: fewer than four.
    """
    if depth < 4:
        raise UserError("model", f"of {depth} blocks", "segmentation reads four of them; take a deeper backbone")
    first, second, third = (round(depth * share) - 1 for share in (1 / 3, 1 / 2, 2 / 3))
    second = max(second, first + 1)  # of five blocks two would fall together
    return first, second, max(third, second + 1), depth - 1


class LinearHead(nn.Module):
    """Four maps, concatenated -> BatchNorm -> 1x1 convolution.

    Args:
        dim: channels of each map.
        num_classes: channels of the logits.
    """

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(4 * dim)
        self.classifier = nn.Conv2d(4 * dim, num_classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four ``[B, D, h, w]`` -> ``[B, num_classes, h, w]``."""
        return self.classifier(self.norm(torch.cat(maps, dim=1)))


class Segmenter(nn.Module):
    """A plain timm backbone (``backbone``), a neck (``neck``) and heads (``decoder``, and ``auxiliary`` or None).

    The backbone's parameters behind its last block (final norm, pooling, classifier) are frozen: no gradient could
    reach them. Every parameter that requires a gradient gets one.

    Args:
        backbone: made with ``num_classes=0``, and with ``dynamic_img_size=True`` unless all images are of its own size.
        num_classes: channels of the logits.
        head: ``upernet``, which needs the extra ``segmentation``, or ``linear``.
        head_width: channels inside UperNet; the linear head has no width.

    Raises:
        UserError: the backbone is not plain or has fewer than four blocks, an unknown head, or no transformers for UperNet.
    """

    def __init__(self, backbone: nn.Module, *, num_classes: int, head: Head = "upernet", head_width: int = 512):
        super().__init__()
        check_plain(backbone, type(backbone).__name__)
        if head not in HEADS:
            raise UserError("--head", head, f"choose from {', '.join(HEADS)}{did_you_mean(head, HEADS)}")
        any_backbone: Any = backbone
        dim = int(any_backbone.feature_info[-1]["num_chs"])
        self.num_classes, self.head, self.head_width = num_classes, head, head_width
        self.taps = tap_blocks(len(any_backbone.feature_info))
        self.neck: nn.Module = nn.Identity()
        self.auxiliary: nn.Module | None = None
        if head == "upernet":
            self.neck = Pyramid(dim)
            self.decoder, self.auxiliary = upernet_heads(dim, num_classes=num_classes, head_width=head_width)
        else:
            self.decoder = LinearHead(dim, num_classes)
        init_convolutions(self)  # the backbone is not in it yet, and keeps its weights
        self.backbone = backbone
        for parameter in _behind_the_blocks(backbone):
            parameter.requires_grad_(False)

    def forward(self, images: Tensor) -> SegmenterOutput:
        """Score every pixel.

        Images are normalised, then padded with zeros at the bottom and right to whole patches; logits are brought to that
        size (bilinear, ``align_corners=False``) and cut back, so that they lie exactly on the images' pixels.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1]; any size, unless the backbone has a fixed one.

        Returns:
            Logits at the images' size, in fp32 at least.

        Raises:
            UserError: a size that the backbone does not take, or a training batch of one value per channel for a BatchNorm.
        """
        batch, _, height, width = images.shape
        patch_height, patch_width = patch_size(self.backbone)
        padded = (-(-height // patch_height) * patch_height, -(-width // patch_width) * patch_width)
        self._check_size((height, width), padded)
        pooled_to_one = self.head == "upernet" or padded == (patch_height, patch_width)
        if self.training and batch == 1 and pooled_to_one:
            remedy = "BatchNorm behind a global pooling cannot train on one image; give at least 2 for each process and step"
            raise UserError("--batch-size", 1, remedy)
        x = F.pad(normalize(self.backbone, images), (0, padded[1] - width, 0, padded[0] - height))
        any_backbone: Any = self.backbone
        maps = any_backbone.forward_intermediates(x, indices=list(self.taps), output_fmt="NCHW", intermediates_only=True)
        levels = self.neck(maps)
        logits = _to_pixels(self.decoder(levels), padded, (height, width))
        auxiliary = None
        if self.training and self.auxiliary is not None:
            auxiliary = _to_pixels(self.auxiliary(levels), padded, (height, width))
        return SegmenterOutput(logits, auxiliary)

    def _check_size(self, size: tuple[int, int], padded: tuple[int, int]) -> None:
        own = nominal_size(self.backbone)
        if padded != own and not getattr(self.backbone, "dynamic_img_size", False):
            remedy = (
                f"this backbone takes {own[0]}x{own[1]} alone; create it with dynamic_img_size=True, or give it that size"
            )
            raise UserError("image size", f"{size[0]}x{size[1]}", remedy)

    def no_weight_decay(self) -> set[str]:
        """The backbone's parameters without weight decay, by their names here."""
        names: Any = getattr(self.backbone, "no_weight_decay", set)
        return {BACKBONE + name for name in names()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """Layers for layer-wise learning-rate decay, as timm's ``group_parameters`` takes them.

        Args:
            coarse: the backbone's coarse groups, where it has such.

        Returns:
            Parameter name -> the ordinal that the backbone's own matcher gives it; infinity, the full learning rate, for the
            head and for what that matcher does not know.
        """
        return layers_below(BACKBONE, self.backbone, coarse=coarse)


def _behind_the_blocks(backbone: nn.Module) -> list[nn.Parameter]:
    """Parameters of the modules that timm runs after the last block; a model's children stand in the order they run in."""
    any_backbone: Any = backbone
    blocks = any_backbone.feature_info[-1]["module"].partition(".")[0]
    children = list(backbone.named_children())
    last = [name for name, _ in children].index(blocks)
    return [parameter for _, child in children[last + 1 :] for parameter in child.parameters()]


def _to_pixels(logits: Tensor, padded: tuple[int, int], size: tuple[int, int]) -> Tensor:
    if logits.dtype in (torch.float16, torch.bfloat16):  # interpolated in half precision, close classes would tie
        logits = logits.float()
    return F.interpolate(logits, size=padded, mode="bilinear", align_corners=False)[..., : size[0], : size[1]]
