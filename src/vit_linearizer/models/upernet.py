"""UperNet's two heads, from transformers, and the pyramid of maps that they read, made from a plain backbone.

Sources: UperNet (arXiv 1807.10221), whose heads are ``UperNetHead`` and ``UperNetFCNHead`` of transformers; the pyramid over
a backbone of one grid is that of the public BEiT segmentation recipe. The two classes are no public names of transformers,
so this file is the only one that knows where they stand.
"""

import importlib
from typing import Any

import torch.nn as nn
from torch import Tensor

from ..contracts import UserError, optional_import

#: Grids that the top level is pooled to (UperNet, section 3.1, after PSPNet).
POOL_SCALES = (1, 2, 3, 6)
#: Width of the auxiliary head's one convolution, and the level that it reads.
AUXILIARY_WIDTH, AUXILIARY_LEVEL = 256, 2

_MODULE, _NAMES = "transformers.models.upernet.modeling_upernet", ("UperNetHead", "UperNetFCNHead")


class Pyramid(nn.Module):
    """Four maps of one grid -> the same at four times, twice, once and half the grid.

    Args:
        dim: channels of every map, before and after.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.x4 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, 2), nn.BatchNorm2d(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2)
        )
        self.x2 = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.x1 = nn.Identity()
        # Rounding up keeps a map of a single patch, and the last row and column of an odd grid.
        self.x05 = nn.MaxPool2d(2, 2, ceil_mode=True)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Four ``[B, D, h, w]`` -> ``[B, D, 4h, 4w]``, ``[B, D, 2h, 2w]``, ``[B, D, h, w]``, ``[B, D, h/2, w/2]`` (up)."""
        first, second, third, fourth = maps
        return [self.x4(first), self.x2(second), self.x1(third), self.x05(fourth)]


def upernet_heads(dim: int, *, num_classes: int, head_width: int) -> tuple[nn.Module, nn.Module]:
    """UperNet's head and its auxiliary head, with fresh weights; both take the four levels of a `Pyramid`.

    Args:
        dim: channels of each level.
        num_classes: channels of the logits.
        head_width: channels inside the head.

    Returns:
        The head, ``-> [B, num_classes, 4h, 4w]``, and the auxiliary head, ``-> [B, num_classes, h, w]``.

    Raises:
        UserError: transformers is not installed, or this version of it has no such heads.
    """
    transformers: Any = optional_import("transformers", extra="segmentation", purpose="--head upernet")
    levels = [dim] * 4
    try:
        module = importlib.import_module(_MODULE)
        head, auxiliary = (getattr(module, name) for name in _NAMES)
        config = transformers.UperNetConfig(
            num_labels=num_classes,
            hidden_size=head_width,
            pool_scales=POOL_SCALES,
            auxiliary_channels=AUXILIARY_WIDTH,
            auxiliary_num_convs=1,
            auxiliary_concat_input=False,
        )
        return head(config, levels), auxiliary(config, levels, in_index=AUXILIARY_LEVEL)
    except (ImportError, AttributeError, TypeError) as error:
        remedy = f"transformers {transformers.__version__} has no such heads ({_MODULE}); take 5.x, or --head linear"
        raise UserError("--head", "upernet", remedy) from error


def init_convolutions(module: nn.Module, *, deviation: float = 0.02) -> None:
    """Normal weights and zero biases for every convolution, as transformers initialises its UperNet; norms stay as built.

    Args:
        module: whose convolutions, transposed ones too.
        deviation: standard deviation of the weights, transformers' ``initializer_range``.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(part.weight, std=deviation)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
