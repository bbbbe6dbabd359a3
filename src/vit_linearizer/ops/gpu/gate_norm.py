"""RMSNorm on a GPU, gated by SiLU or plain, and its derivative.

Source: Mamba-2 (arXiv 2405.21060) for the gated form; must equal `ops.norm`:

    v = y * SiLU(z)        out = v * scale * weight        scale = 1 / sqrt(mean(v^2) + eps)

Backward, with unit = v * scale and gv = (g w - unit mean(g w unit)) scale:

    gy = gv SiLU(z)        gz = gv y SiLU'(z)        gweight = sum over rows of g unit

Floor: 6 D bytes a row forward and 10 D backward with 16-bit numbers (plain 4 D and 6 D), which one pass over memory meets;
9 and 15 kB a token at D = 1536. The backward pass writes one row of sums in fp32 for at least four tiles of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import FUSED, norm_gradient, norm_scale, row_tile, rows_of, rows_within, sigmoid, steps_of, sums_of, unit_of


@triton.jit
def _forward(
    y, z, weight, out, scale, rows, columns, y_step, z_step, eps, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(y + row[:, None] * y_step * UNIT + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if z is not None:
        gate = tl.load(z + row[:, None] * z_step * UNIT + column[None, :], mask=inside, other=0.0).to(tl.float32)
        value = value * gate * sigmoid(gate)
    factor = norm_scale(value, columns, eps)
    weights = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * columns + column[None, :], value * factor[:, None] * weights[None, :], mask=inside)
    tl.store(scale + row, factor, mask=row < rows)


@triton.jit
def _backward(
    g, y, z, weight, scale, gy, gz, sums, rows, columns, g_step, y_step, z_step, gz_step, steps,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    weights = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    gweight = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(0, steps):
        row = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        grad = tl.load(g + row[:, None] * g_step * UNIT + column[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.load(y + row[:, None] * y_step * UNIT + column[None, :], mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(scale + row, mask=row < rows, other=0.0)
        if z is not None:
            gate = tl.load(z + row[:, None] * z_step * UNIT + column[None, :], mask=inside, other=0.0).to(tl.float32)
            share = sigmoid(gate)
            unit = value * gate * share * factor[:, None]
        else:
            unit = value * factor[:, None]
        gweight += grad * unit
        gvalue = norm_gradient(grad, unit, factor, weights, columns)
        if z is not None:
            ggate = gvalue * value * share * (1.0 + gate * (1.0 - share))
            tl.store(gz + row[:, None] * gz_step * UNIT + column[None, :], ggate, mask=inside)
            gvalue = gvalue * gate * share
        tl.store(gy + row[:, None] * columns + column[None, :], gvalue, mask=inside)
    tl.store(sums + part * columns + column, tl.sum(gweight, 0), mask=column < columns)


def gate_norm_forward(y: Tensor, z: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gated RMSNorm.

    Args:
        y: ``[..., D]``, D at most 8192, any stride between rows.
        z: ``[..., D]``, the gate, a view of a wider tensor as well; None for the plain norm.
        weight: ``[D]``, contiguous.
        eps: added to the mean square.

    Returns:
        ``[..., D]`` in the dtype of ``y``, and what each row was multiplied by, fp32 ``[M]`` with M the number of rows.

    Raises:
        ValueError: D is too large.
    """
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    tile = row_tile(y.shape[-1])
    y = rows_of(y)
    z = rows_of(z) if z is not None else None
    rows, columns = y.shape
    scale = torch.empty(rows, dtype=torch.float32, device=y.device)
    steps = (y.stride(0), z.stride(0) if z is not None else 0)
    unit = unit_of(*steps)
    _forward[(triton.cdiv(rows, tile.rows),)](
        y, z, weight, out, scale, rows, columns, *(step // unit for step in steps), eps,
        UNIT=unit, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps, **FUSED,
    )  # fmt: skip
    return out, scale


def gate_norm_backward(
    gout: Tensor, y: Tensor, z: Tensor | None, weight: Tensor, scale: Tensor, gz: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The derivative of `gate_norm_forward`.

    Args:
        gout: ``[..., D]``.
        y: as there.
        z: as there.
        weight: as there.
        scale: what came out there.
        gz: ``[..., D]``, written in place: the part of a larger gradient that belongs to the gate. None where z is None.

    Returns:
        Gradients of ``y`` (contiguous), of ``z`` (``gz``) and of ``weight`` (fp32).

    Raises:
        ValueError: ``gz`` cannot be written as rows, or only one of ``z`` and ``gz`` is there.
    """
    if (z is None) != (gz is None):
        raise ValueError("z and gz belong together: give both or neither")
    gy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    tile = row_tile(y.shape[-1])
    gout, y = rows_of(gout), rows_of(y)
    z = rows_of(z) if z is not None else None
    into = rows_within(gz) if gz is not None else None
    rows, columns = y.shape
    tiles = triton.cdiv(rows, tile.rows)
    steps = steps_of(tiles)
    programs = triton.cdiv(tiles, steps)
    sums = torch.empty(programs, columns, dtype=torch.float32, device=y.device)
    strides = tuple(t.stride(0) if t is not None else 0 for t in (gout, y, z, into))
    unit = unit_of(*strides)
    _backward[(programs,)](
        gout, y, z, weight, scale, gy, into, sums, rows, columns, *(stride // unit for stride in strides), steps,
        UNIT=unit, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps, **FUSED,
    )  # fmt: skip
    return gy, gz, sums_of(sums)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The plain norm: ``[..., D]`` and its scale fp32 ``[M]``; arguments as in `gate_norm_forward`."""
    return gate_norm_forward(x, None, weight, eps)


def rms_norm_backward(gout: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and, in fp32, of ``weight``; arguments as in `gate_norm_backward`."""
    gx, _, gweight = gate_norm_backward(gout, x, None, weight, scale, None)
    return gx, gweight
