"""Into a block's reading order on a GPU, alone or in one pass with the RMSNorm before it. Must equal `ops.reading_order`.

Source: Adventurer (arXiv 2410.07599). Tokens stand as ``[patches, class token]``; a block reads their mean first, then the
patches, reversed where it flips. That is only where rows are written, so the norm (`ops.norm`) needs no pass of its own:

    n_t = x_t * scale_t * weight        out_{place(t)} = n_t        out_0 = mean over t of n_t

The mean is that of the unrounded n_t, in fp32: each program adds up a stretch of tokens, a second kernel adds these sums.
Backward, gn_t = gout_{place(t)} + gout_0 / (N + 1) goes through the derivative of the norm.

Floor with 16-bit numbers, forward and backward: 4 D and 4 D bytes a token, with the norm 4 D and 6 D; 3 and 5 kB at D = 768.
There, sums add a sixteenth to a quarter of that, the fewer tokens the more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import FUSED, RowTile, norm_gradient, norm_scale, row_tile, steps_of, sums_of

_MEAN_PARTS, _MEAN_COLUMNS = 64, 32


@triton.jit
def place_of(token, length, FLIP: tl.constexpr):
    """The row of a token in reading order, behind the mean."""
    if FLIP:
        token = tl.where(token < length - 1, length - 2 - token, token)
    return token + 1


@triton.jit
def _forward(
    x, weight, out, scale, sums, length, columns, parts, steps, eps,
    FLIP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    image, part = program // parts, program % parts
    x += image * length * columns
    out += image * (length + 1) * columns
    column = tl.arange(0, BLOCK)
    if weight is not None:
        weights = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(0, steps):
        token = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (token < length)[:, None] & (column < columns)[None, :]
        value = tl.load(x + token[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if weight is not None:
            factor = norm_scale(value, columns, eps)
            value = value * factor[:, None] * weights
            tl.store(scale + image * length + token, factor, mask=token < length)
        tl.store(out + place_of(token, length, FLIP)[:, None] * columns + column[None, :], value, mask=inside)
        total += value
    tl.store(sums + program * columns + column, tl.sum(total, 0), mask=column < columns)


@triton.jit
def _mean(sums, out, parts, length, columns, tiles, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    image = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    sums += image * parts * columns
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (column < columns)[None, :]
        total += tl.load(sums + part[:, None] * columns + column[None, :], mask=inside, other=0.0)
    tl.store(out + image * (length + 1) * columns + column, tl.sum(total, 0) / length, mask=column < columns)


@triton.jit
def _backward(
    g, x, weight, scale, residual, gx, sums, length, columns, parts, steps,
    FLIP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    image, part = program // parts, program % parts
    here = image * length * columns
    g += image * (length + 1) * columns
    column = tl.arange(0, BLOCK)
    of_mean = tl.load(g + column, mask=column < columns, other=0.0).to(tl.float32)[None, :] / length
    if weight is not None:
        weights = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        total = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(0, steps):
        token = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (token < length)[:, None] & (column < columns)[None, :]
        source = g + place_of(token, length, FLIP)[:, None] * columns + column[None, :]
        grad = tl.load(source, mask=inside, other=0.0).to(tl.float32) + of_mean
        place = here + token[:, None] * columns + column[None, :]
        if weight is not None:
            factor = tl.load(scale + image * length + token, mask=token < length, other=0.0)
            unit = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
            total += grad * unit
            grad = norm_gradient(grad, unit, factor, weights, columns)
        if residual is not None:
            grad += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(gx + place, grad, mask=inside)
    if weight is not None:
        tl.store(sums + program * columns + column, tl.sum(total, 0), mask=column < columns)


def cut(batch: int, length: int, columns: int) -> tuple[RowTile, int, int]:
    """The tile, programs for an image, and tiles that each takes."""
    tile = row_tile(columns)
    tiles = triton.cdiv(length, tile.rows)
    steps = steps_of(batch * tiles)
    return tile, triton.cdiv(tiles, steps), steps


def norm_to_reading_order_forward(
    x: Tensor, weight: Tensor | None, eps: float, flip: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """``to_reading_order(rms_norm(x))`` in one pass.

    Args:
        x: ``[B, N + 1, D]``: patches, class token; D at most 8192.
        weight: ``[D]``, contiguous; None to leave the norm out.
        eps: of the norm.
        flip: whether the patches are reversed.
        dtype: of the output, that of ``x`` unless given: a linear layer that follows in bf16 saves its cast.

    Returns:
        ``[B, N + 2, D]``: mean, patches, class token; and the norm's scale, fp32 ``[B, N + 1]``, or None.

    Raises:
        ValueError: D is too large.
    """
    x = x.contiguous()
    batch, length, columns = x.shape
    tile, parts, steps = cut(batch, length, columns)
    out = torch.empty(batch, length + 1, columns, dtype=dtype or x.dtype, device=x.device)
    scale = torch.empty(batch, length, dtype=torch.float32, device=x.device) if weight is not None else None
    sums = torch.empty(batch * parts, columns, dtype=torch.float32, device=x.device)
    _forward[(batch * parts,)](
        x, weight, out, scale, sums, length, columns, parts, steps, eps,
        FLIP=flip, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps, **FUSED,
    )  # fmt: skip
    tiles = triton.cdiv(columns, _MEAN_COLUMNS)
    _mean[(batch * tiles,)](sums, out, parts, length, columns, tiles, PARTS=_MEAN_PARTS, COLUMNS=_MEAN_COLUMNS, **FUSED)
    return out, scale


def norm_to_reading_order_backward(
    gout: Tensor, x: Tensor, weight: Tensor, scale: Tensor, flip: bool, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The derivative of `norm_to_reading_order_forward`.

    Args:
        gout: ``[B, N + 2, D]``.
        x: as there.
        weight: as there.
        scale: what came out there.
        flip: as there.
        residual: ``[B, N + 1, D]``, another gradient of ``x`` to be added, or None.

    Returns:
        Gradients of ``x``, contiguous and in its dtype, and of ``weight``, in fp32.
    """
    gx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual = residual.contiguous() if residual is not None else None
    sums = _run_backward(gout.contiguous(), x.contiguous(), weight, scale, residual, gx, flip)
    return gx, sums_of(sums)


def to_reading_order_forward(x: Tensor, flip: bool) -> Tensor:
    """``[B, N + 1, D] -> [B, N + 2, D]``: mean, patches (reversed with ``flip``), class token."""
    return norm_to_reading_order_forward(x, None, 0.0, flip)[0]


def to_reading_order_backward(gout: Tensor, flip: bool) -> Tensor:
    """The gradient of `to_reading_order_forward`'s ``x`` from that of its output, ``[B, N + 2, D]``, in the same dtype."""
    batch, length, columns = gout.shape
    gx = torch.empty(batch, length - 1, columns, dtype=gout.dtype, device=gout.device)
    _run_backward(gout.contiguous(), None, None, None, None, gx, flip)
    return gx


def _run_backward(
    gout: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    gx: Tensor,
    flip: bool,
) -> Tensor:
    """Fills ``gx``; partial sums of the gradient of ``weight``, one row a program, empty without a norm."""
    batch, length, columns = gx.shape
    tile, parts, steps = cut(batch, length, columns)
    sums = torch.empty(batch * parts if weight is not None else 0, columns, dtype=torch.float32, device=gx.device)
    _backward[(batch * parts,)](
        gout, x, weight, scale, residual, gx, sums, length, columns, parts, steps,
        FLIP=flip, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps, **FUSED,
    )  # fmt: skip
    return sums
