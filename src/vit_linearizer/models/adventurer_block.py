"""The block of Adventurer, where a causal mixer gets to see the whole image.

Source: Adventurer (arXiv 2410.07599). Two ideas:

- heading average: the mean of all tokens is put before the first, so that every position has seen a summary;
- inter-layer flipping: some blocks read the patches in reverse. The class token stands last and stays there.

Both are undone before the block ends. Parameter names are those of the published weights.
"""

import math
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor

from ..ops import Implementation
from .mamba2 import Mamba2, RMSNorm

Flip = Literal["alternate", "released"]

#: Which blocks read in reverse. ``alternate`` is the paper's rule, two blocks forward and two in reverse; ``released``
#: is what the public weights were trained with, where only blocks 2 and 3 flip.
FLIP_RULES = {
    "alternate": lambda block: (block // 2) % 2 == 1,
    "released": lambda block: block // 2 == 1,
}


class SwiGLU(nn.Module):
    """``w3(SiLU(w1 x) * w2 x)``."""

    def __init__(self, dim: int, hidden_dim: int, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.w1 = nn.Linear(dim, hidden_dim, **dd)
        self.w2 = nn.Linear(dim, hidden_dim, **dd)
        self.w3 = nn.Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class AdventurerBlock(nn.Module):
    """One block: ``x + mixer(norm(x))`` in its reading order, then ``x + mlp(norm(x))``.

    Args:
        dim: width.
        flip: whether this block reads the patches in reverse.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        flip: bool,
        mlp_ratio: float,
        drop_path: float,
        implementation: Implementation,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.flip = flip
        self.norm = RMSNorm(dim, **dd)
        self.mixer = Mamba2(dim, out_scale=1 / math.sqrt(depth), implementation=implementation, **dd)
        self.norm_mlp = RMSNorm(dim, **dd)
        self.mlp = SwiGLU(dim, int(mlp_ratio * dim), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def mix(self, u: Tensor) -> Tensor:
        """The mixer in this block's reading order: ``[B, N + 1, D] -> [B, N + 1, D]``, class token last in both."""
        patches, class_token = u[:, :-1], u[:, -1:]
        if self.flip:
            patches = patches.flip(1)
        mixed = self.mixer(torch.cat([u.mean(dim=1, keepdim=True), patches, class_token], dim=1))
        if self.flip:
            return torch.cat([mixed[:, 1:-1].flip(1), mixed[:, -1:]], dim=1)
        return mixed[:, 1:]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mix(self.norm(x)))
        return x + self.drop_path(self.mlp(self.norm_mlp(x)))
