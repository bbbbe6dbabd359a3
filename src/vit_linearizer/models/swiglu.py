"""SwiGLU, the feed-forward part of an Adventurer block. Source: Adventurer (arXiv 2410.07599)."""

import torch.nn as nn
from torch import Tensor

from ..ops import silu_mul
from .linear import Linear


class SwiGLU(nn.Module):
    """``w3(SiLU(w1 x) * w2 x)``."""

    def __init__(self, dim: int, hidden_dim: int, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.w1 = Linear(dim, hidden_dim, **dd)
        self.w2 = Linear(dim, hidden_dim, **dd)
        self.w3 = Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, L, dim] -> [B, L, dim]``."""
        return self.w3(silu_mul(self.w1(x), self.w2(x)))
