"""The Mamba-2 scan on a GPU, forward: short kernels over chunks of tokens.

Source: the state-space-dual form of Mamba-2 (arXiv 2405.21060, section 6). With dt = softplus(dt_raw + dt_bias),
A = -exp(A_log) and a_i the sum of dt_m A over the tokens of a chunk up to i, it must equal `ssd_reference`:

    y_i = sum_{j <= i} e^(a_i - a_j) (C_i . B_j) dt_j x_j  +  e^a_i C_i S  +  D x_i
    S'  = e^a_last S + sum_j e^(a_last - a_j) dt_j B_j x_j^T

`scan_states` makes dt, a and the states between chunks; `_outputs_kernel` here makes y, a tile of tokens at a time, with
C B^T computed where it is used and never stored.

Factors of products are in the dtype of x, all else in fp32. One group of B and C is shared by all heads and read as it is,
by its strides.

The floor, for 24 heads with P = N = 64 in bf16: x, B, C, dt_raw and y are 6.4 kB a token. These kernels read x twice and
pass over a state of 393 kB a chunk four times, with chunks of 128 about 22 kB a token, for 1.0 MFLOP: on a Hopper GPU some
7 ns of memory traffic (less where a batch fits in the second-level cache) beside 2 to 3 ns of arithmetic.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .scan_states import CHUNK, KEY, UNSPECIALISED, carried_states, shapes_of, step_sizes


@tuning.autotune(
    [
        triton.Config({"GROUP": group, "COLUMNS": columns}, num_warps=4, num_stages=stages, maxnreg=registers)
        for group, columns, stages, registers in (
            (2, 32, 2, None), (1, 32, 1, None), (1, 64, 1, None), (4, 64, 2, None), (1, 32, 2, 168), (4, 32, 2, 168),
            (1, 32, 1, 128), (4, 32, 2, 128),
        )
    ],
    key=KEY,
)  # fmt: skip
@triton.jit(do_not_specialize=UNSPECIALISED)
def _outputs_kernel(
    x,
    B,
    C,
    D,
    dt,
    a,
    states,
    y,
    x_b,
    x_l,
    x_h,
    B_b,
    B_l,
    C_b,
    C_l,
    length,
    heads,
    between,
    bucket,  # noqa: ARG001
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_STATES: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``y [batch, L, H, P]`` of a tile of tokens i for a group of heads, from some tokens j of the chunk at a time."""
    first_head = tl.program_id(0) * GROUP
    tile = tl.program_id(1) * TILE
    batch = tl.program_id(2).to(tl.int64)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    i = tile + tl.arange(0, TILE)
    there = i < length
    row = i.to(tl.int64)[:, None]
    chunk = tile // CHUNK
    C_i = tl.load(C + batch * C_b + row * C_l + n[None, :], mask=there[:, None], other=0.0).to(OPERAND)
    stop = tl.minimum(tile + TILE, length)
    WIDTH: tl.constexpr = COLUMNS if COLUMNS < TILE else TILE
    for h in range(first_head, tl.minimum(first_head + GROUP, heads)):
        steps = (batch * heads + h) * length
        x_ptr = x + batch * x_b + h * x_h + p[None, :]
        x_i = tl.load(x_ptr + row * x_l, mask=there[:, None], other=0.0)
        a_i = tl.load(a + steps + i, mask=there, other=0.0)
        y_i = x_i.to(tl.float32) * tl.load(D + h).to(tl.float32)
        if HAS_STATES:
            at = ((batch * between + chunk - 1) * heads + h) * (N * P) + n[:, None] * P + p[None, :]
            state = tl.load(states + at, mask=(n < chunk * N)[:, None], other=0.0).to(OPERAND)
            y_i += tl.dot(C_i, state, input_precision=PRECISION) * tl.exp(a_i)[:, None]
        for first in range(chunk * CHUNK, stop, WIDTH):
            j = first + tl.arange(0, WIDTH)
            inside = j < length
            row_j = j.to(tl.int64)[:, None]
            B_j = tl.load(B + batch * B_b + row_j * B_l + n[None, :], mask=inside[:, None], other=0.0).to(OPERAND)
            x_j = tl.load(x_ptr + row_j * x_l, mask=inside[:, None], other=0.0).to(OPERAND)
            a_j = tl.load(a + steps + j, mask=inside, other=0.0)
            dt_j = tl.load(dt + steps + j, mask=inside, other=0.0)
            # The mask goes in before exp, which would overflow above the diagonal.
            reads = (j[None, :] <= i[:, None]) & there[:, None]
            decay = tl.exp(tl.where(reads, a_i[:, None] - a_j[None, :], float("-inf")))
            weights = tl.dot(C_i, tl.trans(B_j), input_precision=PRECISION) * decay * dt_j[None, :]
            y_i += tl.dot(weights.to(OPERAND), x_j, input_precision=PRECISION)
        at = ((batch * length + row) * heads + h) * P + p[None, :]
        tl.store(y + at, y_i, mask=there[:, None])


def fits_scan(x: Tensor, B: Tensor) -> bool:
    """Whether these kernels serve ``x [batch, L, H, P]`` and ``B [batch, L, N]``: dtype, P and N from 16 to 128."""
    sizes = {16, 32, 64, 128}
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.shape[-1] in sizes and B.shape[-1] in sizes


def scan_forward(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt_raw: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    *,
    keep_states: bool = True,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor | None]:
    """Run the scan from a zero state; sizes and dtypes as `fits_scan` has them.

    Args:
        x: ``[batch, L, H, P]`` in fp32, bf16 or fp16, a view with any strides.
        B: ``[batch, L, N]``, likewise, in the dtype of x.
        C: as B.
        dt_raw: ``[batch, L, H]``, likewise, in any floating dtype.
        dt_bias: ``[H]``.
        A_log: ``[H]``.
        D: ``[H]``.
        keep_states: whether a backward will ask for them.
        chunk: tokens of a chunk, a power of two of at least 16.

    Returns:
        ``[batch, L, H, P]`` contiguous in the dtype of x, and the states between chunks, ``[batch, chunks - 1, H, N, P]``
        fp32, or None.
    """
    x, B, C = tuning.rows(x), tuning.rows(B), tuning.rows(C)
    dt_bias, A_log, D = dt_bias.contiguous(), A_log.contiguous(), D.contiguous()
    batch, length, heads, P = x.shape
    shapes = shapes_of(x, B, chunk)
    y = torch.empty((batch, length, heads, P), dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        dt, a = step_sizes(dt_raw, dt_bias, A_log, chunk)
        states = carried_states(B, x, dt, a, shapes)

        def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
            return triton.cdiv(heads, meta["GROUP"]), triton.cdiv(length, meta["TILE"]), batch

        _outputs_kernel[grid](
            x, B, C, D, dt, a, states, y, *x.stride()[:3], *B.stride()[:2], *C.stride()[:2], length, heads,
            states.shape[1], tuning.bucket(batch * length), HAS_STATES=states.shape[1] > 0, **shapes,
        )  # fmt: skip
    return y, states if keep_states else None
