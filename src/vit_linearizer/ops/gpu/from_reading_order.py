"""Out of a block's reading order on a GPU, alone or in one pass with the RMSNorm after it. Must equal `ops.reading_order`.

Source: Adventurer (arXiv 2410.07599). What a mixer made of each token is added to the token, in its own place, and the MLP
reads the norm of the sum. Both leave in one pass:

    s_t = x_t + mixed_{place(t)}        n_t = s_t * scale_t * weight

The norm is that of the sum as it is kept, rounded, from which the backward pass starts.

Floor with 16-bit numbers, bytes a token forward and backward: 6 D and 4 D, with the norm 8 D and 10 D.
Backward, sums add a fortieth to a tenth of that at D = 768, the fewer tokens the more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reading_order import cut, place_of
from .tiles import FUSED, norm_gradient, norm_scale, row_tile, sums_of


@triton.jit
def _forward(
    x, mixed, weight, added, out, scale, length, columns, parts, eps,
    FLIP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    image = program // parts
    token = program % parts * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (token < length)[:, None] & (column < columns)[None, :]
    place = (image * length + token)[:, None] * columns + column[None, :]
    source = (image * (length + 1) + place_of(token, length, FLIP))[:, None] * columns + column[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(mixed + source, mask=inside, other=0.0).to(tl.float32)
    rounded = value.to(added.dtype.element_ty)
    tl.store(added + place, rounded, mask=inside)
    if weight is not None:
        value = rounded.to(tl.float32)
        factor = norm_scale(value, columns, eps)
        weights = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        tl.store(out + place, value * factor[:, None] * weights, mask=inside)
        tl.store(scale + image * length + token, factor, mask=token < length)


@triton.jit
def _backward(
    gadded, gout, added, weight, scale, gx, gmixed, sums, length, columns, parts, steps,
    FLIP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    image, part = program // parts, program % parts
    column = tl.arange(0, BLOCK)
    gmixed += image * (length + 1) * columns
    if part == 0:
        tl.store(gmixed + column, tl.zeros((BLOCK,), tl.float32), mask=column < columns)
    if gout is not None:
        weights = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        total = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(0, steps):
        token = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (token < length)[:, None] & (column < columns)[None, :]
        place = (image * length + token)[:, None] * columns + column[None, :]
        grad = tl.load(gadded + place, mask=inside, other=0.0).to(tl.float32)
        if gout is not None:
            factor = tl.load(scale + image * length + token, mask=token < length, other=0.0)
            unit = tl.load(added + place, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
            of_norm = tl.load(gout + place, mask=inside, other=0.0).to(tl.float32)
            total += of_norm * unit
            grad += norm_gradient(of_norm, unit, factor, weights, columns)
            tl.store(gx + place, grad, mask=inside)
        tl.store(gmixed + place_of(token, length, FLIP)[:, None] * columns + column[None, :], grad, mask=inside)
    if gout is not None:
        tl.store(sums + program * columns + column, tl.sum(total, 0), mask=column < columns)


def add_and_norm_forward(
    x: Tensor, mixed: Tensor, weight: Tensor, eps: float, flip: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``s = add_from_reading_order(x, mixed)`` and ``rms_norm(s)`` in one pass.

    Args:
        x: ``[B, N + 1, D]``: patches, class token; D at most 8192.
        mixed: ``[B, N + 2, D]`` in reading order; its first token is not read.
        weight: ``[D]``, contiguous.
        eps: of the norm.
        flip: whether the patches of ``mixed`` are reversed.
        dtype: of the norm, that of the sum unless given: a linear layer that follows in bf16 saves its cast.

    Returns:
        The sum ``[B, N + 1, D]`` in the dtype that ``x`` and ``mixed`` promote to, its norm, and the norm's scale, fp32
        ``[B, N + 1]``.

    Raises:
        ValueError: ``mixed`` has not one token more than ``x``, or D is too large.
    """
    added = _sum_of(x, mixed)
    out = torch.empty(x.shape, dtype=dtype or added.dtype, device=x.device)
    scale = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    _run_forward(x, mixed, weight, added, out, scale, eps, flip)
    return added, out, scale


def add_and_norm_backward(
    gadded: Tensor,
    gout: Tensor,
    added: Tensor,
    weight: Tensor,
    scale: Tensor,
    flip: bool,
    x_dtype: torch.dtype | None = None,
    mixed_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative of `add_and_norm_forward`.

    Args:
        gadded: ``[B, N + 1, D]``, gradient of the sum.
        gout: ``[B, N + 1, D]``, gradient of the norm.
        added: the sum that came out there.
        weight: as there.
        scale: what came out there.
        flip: as there.
        x_dtype: of the gradient of ``x``, that of ``added`` unless given.
        mixed_dtype: of the gradient of ``mixed``, likewise.

    Returns:
        Gradients of ``x`` ``[B, N + 1, D]``, of ``mixed`` ``[B, N + 2, D]`` (zero in its first token), of ``weight`` (fp32).
    """
    batch, length, columns = added.shape
    gx = torch.empty(added.shape, dtype=x_dtype or added.dtype, device=added.device)
    gmixed = torch.empty(batch, length + 1, columns, dtype=mixed_dtype or added.dtype, device=added.device)
    sums = _run_backward(gadded, gout.contiguous(), added, weight, scale, gx, gmixed, flip)
    return gx, gmixed, sums_of(sums)


def add_from_reading_order_forward(x: Tensor, mixed: Tensor, flip: bool) -> Tensor:
    """The sum alone; arguments and errors as in `add_and_norm_forward`."""
    added = _sum_of(x, mixed)
    _run_forward(x, mixed, None, added, None, None, 0.0, flip)
    return added


def add_from_reading_order_backward(gadded: Tensor, flip: bool, mixed_dtype: torch.dtype | None = None) -> Tensor:
    """The gradient of `add_from_reading_order_forward`'s ``mixed``; that of ``x`` is ``gadded`` itself.

    Args:
        gadded: ``[B, N + 1, D]``.
        flip: as there.
        mixed_dtype: of the output, that of ``gadded`` unless given.

    Returns:
        ``[B, N + 2, D]``, zero in its first token.
    """
    batch, length, columns = gadded.shape
    gmixed = torch.empty(batch, length + 1, columns, dtype=mixed_dtype or gadded.dtype, device=gadded.device)
    _run_backward(gadded, None, None, None, None, None, gmixed, flip)
    return gmixed


def _sum_of(x: Tensor, mixed: Tensor) -> Tensor:
    """Room for the sum."""
    batch, length, columns = x.shape
    if mixed.shape != (batch, length + 1, columns):
        raise ValueError(f"mixed must have one token more than x, {(batch, length + 1, columns)}, not {tuple(mixed.shape)}")
    return torch.empty(x.shape, dtype=torch.promote_types(x.dtype, mixed.dtype), device=x.device)


def _run_forward(
    x: Tensor,
    mixed: Tensor,
    weight: Tensor | None,
    added: Tensor,
    out: Tensor | None,
    scale: Tensor | None,
    eps: float,
    flip: bool,
) -> None:
    batch, length, columns = x.shape
    tile = row_tile(columns)
    parts = triton.cdiv(length, tile.rows)
    _forward[(batch * parts,)](
        x.contiguous(), mixed.contiguous(), weight, added, out, scale, length, columns, parts, eps,
        FLIP=flip, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps, **FUSED,
    )  # fmt: skip


def _run_backward(
    gadded: Tensor,
    gout: Tensor | None,
    added: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    gx: Tensor | None,
    gmixed: Tensor,
    flip: bool,
) -> Tensor:
    """Fills ``gx`` and ``gmixed``; partial sums of the gradient of ``weight``, one row a program, empty without a norm."""
    batch, length, columns = gadded.shape
    tile, parts, steps = cut(batch, length, columns)
    sums = torch.empty(batch * parts if weight is not None else 0, columns, dtype=torch.float32, device=gadded.device)
    _backward[(batch * parts,)](
        gadded.contiguous(), gout, added, weight, scale, gx, gmixed, sums, length, columns, parts, steps,
        FLIP=flip, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps, **FUSED,
    )  # fmt: skip
    return sums
