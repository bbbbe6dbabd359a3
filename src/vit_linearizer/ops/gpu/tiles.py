"""What the kernels around the scan share: SiLU, the derivative of RMSNorm, shapes of tiles, and how strides are passed.

Arithmetic is in fp32 whatever the tensors hold. Nothing here or in these kernels (unlike the scan's, see `tuning`) depends
on the GPU's size or on timing, and no kernel adds into memory: equal inputs give equal bits. Tiles are choices made by
counting registers and loads in flight on a Hopper GPU, not tuned by measurement.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

#: For every launch: products and sums in one instruction, which Triton 3.10 would want to be asked for and 3.9 warns of.
FUSED = {"enable_fp_fusion": True}
#: The widest row that one program holds.
WIDEST = 8192
_TILE = 2048  # elements, 16 for each thread of four warps
_PER_WARP = 512


class RowTile(NamedTuple):
    """Whole rows that a program takes at once: how many, their width rounded up to a power of two, and the warps for it."""

    rows: int
    block: int
    warps: int


def row_tile(columns: int) -> RowTile:
    """The tile for rows of so many columns.

    Raises:
        ValueError: a row is too wide for one program.
    """
    if not 1 <= columns <= WIDEST:
        raise ValueError(f"rows must have 1 to {WIDEST} columns, not {columns}")
    block = triton.next_power_of_2(columns)
    rows = max(1, _TILE // block)
    return RowTile(rows, block, min(16, rows * block // _PER_WARP))


def steps_of(tiles: int) -> int:
    """Tiles that a program takes one after another where it sums over rows.

    Many, so that its sums cost little beside what it reads; fewer where that would leave the GPU without programs.
    """
    return max(4, min(16, tiles // 1024))


def unit_of(*steps: int) -> int:
    """A factor of all strides, at most 16.

    Kernels get strides divided by it and multiply it back as a constant. That tells the compiler that rows start at
    multiples of it, which it needs to know to load 16 bytes at once. It finds out by itself for multiples of 16 only, and
    the 3224 columns of a base model's ``in_proj`` are one of 8.
    """
    return math.gcd(16, *steps)


def dense(t: Tensor) -> Tensor:
    """The tensor itself where neighbours in the last dimension are neighbours in memory, else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def rows_of(t: Tensor) -> Tensor:
    """``[..., D] -> [M, D]``, to read from: a view where the strides allow one, else a copy."""
    return dense(t.reshape(t.numel() // t.shape[-1], t.shape[-1]))


def rows_within(t: Tensor) -> Tensor:
    """``[..., D] -> [M, D]``, to write into.

    Raises:
        ValueError: it is not a view with neighbours in the last dimension.
    """
    if t.stride(-1) != 1 and t.shape[-1] != 1:
        raise ValueError(f"a gradient can only be written into rows without gaps, not into strides {t.stride()}")
    return t.view(t.numel() // t.shape[-1], t.shape[-1])


def sums_of(partial: Tensor) -> Tensor:
    """Partial sums of programs, fp32 ``[programs, ...]``, added up in an order that is always the same."""
    return torch.sum(partial, 0)


@triton.jit
def sigmoid(x):
    """``1 / (1 + exp(-x))`` without an exponential that could overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def norm_scale(x, columns, eps):
    """``1 / sqrt(mean(x^2) + eps)`` of each row of a tile whose columns beyond ``columns`` are zero."""
    return tl.rsqrt(tl.sum(x * x, 1) / columns + eps)


@triton.jit
def norm_gradient(g, unit, scale, weight, columns):
    """Gradient of x in ``unit * weight`` with ``unit = x * scale``: ``(g w - unit mean(g w unit)) scale``."""
    g = g * weight
    along = tl.sum(g * unit, 1) / columns
    return (g - unit * along[:, None]) * scale[:, None]
