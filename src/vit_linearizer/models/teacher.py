"""The frozen teacher: any plain timm ViT with its own normalisation and its own image size.

Source: ViT-Linearizer (arXiv 2504.00037, figure 2 and section 4.1). A `Teacher` is not an ``nn.Module``: placed in a module
it shows up neither in parameters nor in the state dict, and ``train()`` does not reach it.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..contracts import Features, UserError
from .adapters import check_plain, extract_features, patch_grid, patch_size
from .loading import create_backbone, probe_backbone


class Teacher:
    """A frozen backbone that answers with `Features`.

    Args:
        model: a plain timm backbone; it is set to evaluation mode and its parameters stop requiring gradients.
        image_size: (height, width) that images are resized to before it sees them.
    """

    def __init__(self, model: nn.Module, image_size: tuple[int, int]):
        self.model = model.eval().requires_grad_(False)
        self.image_size = image_size
        self.grid = patch_grid(model, image_size)

    def to(self, device: torch.device) -> "Teacher":
        """Move to a device; returns itself."""
        self.model.to(device)
        return self

    @property
    def dim(self) -> int:
        """Width of its tokens."""
        return int(self.model.num_features)  # type: ignore[arg-type]

    @torch.no_grad()
    def features(self, images: Tensor, *, stages: int = 1) -> Features:
        """``[B, 3, H, W]`` in [0, 1], the same view that the student gets -> `Features` without gradient."""
        if tuple(images.shape[-2:]) != self.image_size:
            images = F.interpolate(images, size=self.image_size, mode="bicubic", antialias=True, align_corners=False)
            images = images.clamp(0, 1)
        return extract_features(self.model, images, stages=stages)


def agreeing_size(
    name: str,
    *,
    student_grid: tuple[int, int],
    architecture: str | None = None,
    image_size: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """The teacher's (height, width) at which its patch grid is the student's; no weights are loaded for it.

    Args:
        name: anything `create_backbone` takes.
        student_grid: the student's patches (down, across).
        architecture: timm name behind a weight file.
        image_size: what the user asked for; None to choose, e.g. 196 for a patch-14 teacher of a patch-16 student at 224.

    Raises:
        UserError: unknown or unfit model, or the size asked for gives another grid; the message names the one that does not.
    """
    probe = probe_backbone(name, field="--teacher", architecture=architecture)
    check_plain(probe, name, field="--teacher")
    height, width = patch_size(probe)
    agreeing = (student_grid[0] * height, student_grid[1] * width)
    if image_size is not None and image_size != agreeing:
        given, wanted = (f"{h}x{w}" for h, w in (image_size, agreeing))
        remedy = (
            f"with patches of {height}x{width} this is not the student's grid of {student_grid[0]} x {student_grid[1]}"
            f" patches; use {wanted} (or leave it out), or another --image-size"
        )
        raise UserError("--teacher-image-size", given, remedy)
    return agreeing


def load_teacher(
    name: str, *, image_size: tuple[int, int], architecture: str | None = None, pretrained: bool = True
) -> Teacher:
    """Create a frozen teacher for an image size, see `agreeing_size`; its head is left out.

    Args:
        name: anything `create_backbone` takes.
        image_size: (height, width); position embeddings are resampled to it.
        architecture: timm name behind a weight file.
        pretrained: False for random weights (to try things out).

    Raises:
        UserError: weights that cannot be fetched or do not fit.
    """
    model = create_backbone(name, field="--teacher", architecture=architecture, pretrained=pretrained, img_size=image_size)
    return Teacher(model, image_size)
