"""The Mamba-2 scan on a GPU, backward: gradients of `scan.scan_forward` by its derivative written out.

With the symbols of `scan`, L_ij = e^(a_i - a_j) for j <= i, G = C B^T, W = L * G * dt, w_j = e^(a_last - a_j) dt_j, R the
gradient of the state behind the chunk, and g for gradients of what follows them:

    gx = W^T gy + w (B R) + D gy                    gW = gy x^T (j <= i)          gG = gW * L * dt
    gC = sum over heads of e^a (gy S^T) + gG B      gB = sum over heads of w (x R^T) + gG^T C
    R' = e^a_last R + (e^a C)^T gy                  V = gW * L * G                u_j = w_j B_j . (x R^T)_j
    ga_i = sum_{j < i} V_ij dt_j - dt_i sum_{k > i} V_ki + e^a_i C_i . (gy S^T)_i
    l_i = sum_{m >= i} ga_m + sum_{j < i} u_j + e^a_last (S . R)
    gdt_j = sum_{i >= j} V_ij + e^(a_last - a_j) B_j . (x R^T)_j + A l_j

`scan_states` makes R as it makes S, `scan_gradients` what belongs to tiles of tokens, `_steps_backward_kernel` l and what
hangs on it. Nothing is added atomically: sums over heads and tokens are written in parts and added up by PyTorch, in the
same order each time.

The floor, for 24 heads with P = N = 64 in bf16: x, gy, gx, B, C and their gradients are 9.9 kB a token. These kernels read
gy three times and x twice, and pass over R four times and S once: with chunks of 128 about 35 kB a token, for 2.9 MFLOP. On
a Hopper GPU that is some 11 ns of memory traffic and 7 to 10 ns of arithmetic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .scan_gradients import read_kernel, reader_kernel
from .scan_states import CHUNK, carried_states, shapes_of, step_sizes
from .tiles import FUSED

#: Programs that fill a GPU a few times over: so many at least, by dividing the heads, before a program takes more of them.
_PROGRAMS = 512


@triton.jit
def _steps_backward_kernel(
    parts,
    across,
    dt,
    dt_raw,
    dt_bias,
    A_log,
    gdt_raw,
    sums,
    raw_b,
    raw_l,
    raw_h,
    graw_b,
    graw_l,
    graw_h,
    length,
    heads,
    CHUNK: tl.constexpr,
    HAS_STATES: tl.constexpr,
    HEADS: tl.constexpr,
):
    """gdt_raw of a chunk for a block of heads, and ``sums [2, batch, chunks, H]``: its parts of gdt_bias and gA_log."""
    batch = tl.program_id(2).to(tl.int64)
    chunk = tl.program_id(1)
    t = chunk * CHUNK + tl.arange(0, CHUNK)
    h = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    head = h < heads
    there = head[:, None] & (t < length)[None, :]
    size = tl.num_programs(2).to(tl.int64) * heads * length
    at = (batch * heads + h)[:, None] * length + t[None, :]
    read = tl.load(parts + at, mask=there, other=0.0)
    gdt = tl.load(parts + size + at, mask=there, other=0.0) + read
    step = tl.load(dt + at, mask=there, other=0.0)
    ga = tl.load(parts + 3 * size + at, mask=there, other=0.0) - read * step
    slot = (batch * tl.num_programs(1) + chunk) * heads + h
    gdecay = tl.cumsum(ga, axis=1, reverse=True)
    if HAS_STATES:
        u = tl.load(parts + 2 * size + at, mask=there, other=0.0)
        gdecay += tl.cumsum(u, axis=1) - u
        gdecay += tl.load(across + slot, mask=head, other=0.0)[:, None]
    rate = -tl.exp(tl.load(A_log + h, mask=head, other=0.0).to(tl.float32))
    raw = dt_raw + batch * raw_b + t.to(tl.int64)[None, :] * raw_l + h[:, None] * raw_h
    bias = tl.load(dt_bias + h, mask=head, other=0.0).to(tl.float32)
    z = tl.load(raw, mask=there, other=0.0).to(tl.float32) + bias[:, None]
    e = tl.exp(-tl.abs(z))
    sigmoid = tl.where(z >= 0, 1.0, e) / (1.0 + e)
    graw = tl.where(there, (gdt + rate[:, None] * gdecay) * sigmoid, 0.0)
    tl.store(gdt_raw + batch * graw_b + t.to(tl.int64)[None, :] * graw_l + h[:, None] * graw_h, graw, mask=there)
    sums_size = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * heads
    tl.store(sums + slot, tl.sum(graw, axis=1), mask=head)
    tl.store(sums + sums_size + slot, rate * tl.sum(tl.where(there, gdecay * step, 0.0), axis=1), mask=head)


def scan_backward(
    gy: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt_raw: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    states: Tensor | None,
    *,
    chunk: int = CHUNK,
    into: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `scan.scan_forward`, the same to the bit each time that the same launches are chosen.

    Args:
        gy: ``[batch, L, H, P]``, the gradient of y, with any strides.
        x: as in `scan.scan_forward`, and the tensors after it.
        B: as there.
        C: as there.
        dt_raw: as there.
        dt_bias: as there.
        A_log: as there.
        D: as there.
        states: what `scan.scan_forward` kept with the same chunk; None computes them again.
        chunk: as there.
        into: where the first four gradients go, views of a larger gradient say, dense in their last dimension.

    Returns:
        Gradients of x, B, C and dt_raw, in their dtypes; of dt_bias, A_log and D, in fp32.
    """
    gy, x, B, C = tuning.rows(gy.to(x.dtype)), tuning.rows(x), tuning.rows(B), tuning.rows(C)
    dt_bias, A_log, D = dt_bias.contiguous(), A_log.contiguous(), D.contiguous()
    batch, length, heads, _ = x.shape
    N = B.shape[-1]
    shapes = shapes_of(x, B, chunk)
    if into is None:
        into = (torch.empty_like(x), torch.empty_like(B), torch.empty_like(C), torch.empty_like(dt_raw))
    gx, gB, gC, gdt_raw = into
    tiles, chunks = triton.cdiv(length, shapes["TILE"]), triton.cdiv(length, chunk)
    group = triton.cdiv(heads, min(heads, triton.cdiv(_PROGRAMS, batch * tiles)))
    groups = triton.cdiv(heads, group)

    def part(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    gBC, parts, across = part(groups, batch, length, 2 * N), part(4, batch, heads, length), part(batch, chunks, heads)
    gD, sums = part(batch, tiles, heads), part(2, batch, chunks, heads)
    with torch.cuda.device_of(x):
        dt, a = step_sizes(dt_raw, dt_bias, A_log, chunk)
        if states is None:
            states = carried_states(B, x, dt, a, shapes)
        behind = carried_states(C, gy, dt, a, shapes, reverse=True)
        has_states = states.shape[1] > 0
        sizes = (length, heads, states.shape[1], tuning.bucket(batch * length))
        strides = (*gy.stride()[:3], *x.stride()[:3], *B.stride()[:2], *C.stride()[:2])
        read_kernel[groups, tiles, batch](
            gy, x, B, C, D, dt, a, behind, gx, gBC, parts, gD, *strides, *gx.stride()[:3], *sizes,
            HAS_STATES=has_states, GROUP=group, **shapes,
        )  # fmt: skip
        reader_kernel[groups, tiles, batch](
            gy,
            x,
            B,
            C,
            dt,
            a,
            states,
            behind,
            gBC,
            parts,
            across,
            *strides,
            *sizes,
            HAS_STATES=has_states,
            GROUP=group,
            **shapes,
        )
        _steps_backward_kernel[triton.cdiv(heads, 16), chunks, batch](
            parts, across, dt, dt_raw, dt_bias, A_log, gdt_raw, sums, *dt_raw.stride(), *gdt_raw.stride(), length, heads,
            CHUNK=chunk, HAS_STATES=has_states, HEADS=16, num_warps=4, **FUSED,
        )  # fmt: skip
    total = gBC[0] if groups == 1 else gBC.sum(0)
    gB.copy_(total[..., :N])
    gC.copy_(total[..., N:])
    gdt_bias, gA_log = (part.sum((0, 1)) for part in sums)  # two storages: outputs of an operator may not share one
    return gx, gB, gC, gdt_raw, gdt_bias, gA_log, gD.sum((0, 1))
