"""The block of Adventurer, where a causal mixer gets to see the whole image.

Source: Adventurer (arXiv 2410.07599). Two ideas:

- heading average: the mean of all tokens is put before the first, so that every position has seen a summary;
- inter-layer flipping: some blocks read the patches in reverse. The class token stands last and stays there.

Both are undone before the block ends. Parameter names are those of the published weights.
"""

import math
from typing import Literal

import torch
import torch.fx
import torch.nn as nn
from timm.layers import DropPath
from torch import Tensor

from ..ops import (
    Implementation,
    add_and_norm,
    add_from_reading_order,
    exporting,
    norm_to_reading_order,
    to_reading_order,
)
from .long_sequences import block_goes_in_parts, block_in_parts, class_token_core_in_parts
from .mamba2 import Mamba2, RMSNorm
from .swiglu import SwiGLU
from .watching import all_are_watched, is_watched

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

    def forward(self, x: Tensor, class_token_alone: bool = False) -> Tensor:
        """``[B, N + 1, D] -> [B, N + 1, D]``, class token last in both.

        Args:
            x: tokens.
            class_token_alone: give ``[B, 1, D]``, the last row, for a block whose other rows nobody reads.
        """
        if torch.jit.is_scripting():
            return self.in_one_go(x, class_token_alone)
        else:
            if not block_goes_in_parts(self, x):
                return self.in_one_go(x, class_token_alone)
            if not class_token_alone:
                return block_in_parts(self, x)
            mixed = self.mixer.out_proj(class_token_core_in_parts(self, x))
            x = x[:, -1:] + mixed
            return self._feed_forward(x, self.norm_mlp(x))

    def in_one_go(self, x: Tensor, class_token_alone: bool = False) -> Tensor:
        """`forward` as the paper says it."""
        mixed = self.drop_path(self.mixer(self._norm_and_order(x), class_token_alone))
        if class_token_alone:
            x = x[:, -1:] + mixed
            return self._feed_forward(x, self.norm_mlp(x))
        x, normed = self._add_and_norm(x, mixed)
        return self._feed_forward(x, normed)

    def _norm_and_order(self, x: Tensor) -> Tensor:
        """What the mixer reads."""
        if not torch.jit.is_scripting():  # noqa: SIM102  # TorchScript leaves out what this alone rules out
            if _is_its_function(self.norm, x):
                return norm_to_reading_order(x, self.norm.weight, self.norm.eps, self.flip)
        return to_reading_order(self.norm(x), self.flip)

    def _add_and_norm(self, x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens with the mixer's output added, and what the MLP reads of them."""
        if not torch.jit.is_scripting():  # noqa: SIM102
            if _is_its_function(self.norm_mlp, x):
                return add_and_norm(x, mixed, self.norm_mlp.weight, self.norm_mlp.eps, self.flip)
        x = add_from_reading_order(x, mixed, self.flip)
        return x, self.norm_mlp(x)

    def _feed_forward(self, x: Tensor, normed: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(normed))


def _is_its_function(norm: nn.Module, x: Tensor) -> bool:
    """Whether a norm may be calculated within another operator: nobody replaced it, looks at it or records it."""
    return (
        type(norm) is RMSNorm
        and not isinstance(x, torch.fx.Proxy)
        and not exporting()
        and not all_are_watched()
        and not is_watched(norm)
    )
