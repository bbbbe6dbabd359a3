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
from timm.layers import DropPath
from torch import Tensor

from ..ops import Implementation, add_from_reading_order, to_reading_order
from .long_sequences import block_in_parts, class_token_core_in_parts, goes_in_parts
from .mamba2 import Mamba2, RMSNorm
from .swiglu import SwiGLU

Flip = Literal["alternate", "released"]

#: Which blocks read in reverse. ``alternate`` is the paper's rule, two blocks forward and two in reverse; ``released``
#: is what the public weights were trained with, where only blocks 2 and 3 flip.
FLIP_RULES = {
    "alternate": lambda block: (block // 2) % 2 == 1,
    "released": lambda block: block // 2 == 1,
}


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

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N + 1, D] -> [B, N + 1, D]``, class token last in both."""
        if torch.jit.is_scripting():
            return self.in_one_go(x)
        else:
            return block_in_parts(self, x) if goes_in_parts(self, x) else self.in_one_go(x)

    def in_one_go(self, x: Tensor) -> Tensor:
        """`forward` as the paper says it."""
        mixed = self.mixer(to_reading_order(self.norm(x), self.flip))
        x = add_from_reading_order(x, self.drop_path(mixed), self.flip)
        return x + self.drop_path(self.mlp(self.norm_mlp(x)))

    @torch.jit.unused
    def class_token(self, x: Tensor) -> Tensor:
        """``[B, N + 1, D] -> [B, 1, D]``: the last row of `forward` alone, for a block whose other rows nobody reads."""
        if goes_in_parts(self, x):
            mixed = class_token_core_in_parts(self, x)
        else:
            mixed = self.mixer.core(self.mixer.in_proj(to_reading_order(self.norm(x), self.flip)))[:, -1:]
        x = x[:, -1:] + self.drop_path(self.mixer.out_proj(mixed))
        return x + self.drop_path(self.mlp(self.norm_mlp(x)))
