"""The Mamba-2 scan on a GPU: step sizes, and the states between chunks of tokens, in either direction.

Source: the state-space-dual form of Mamba-2 (arXiv 2405.21060, section 6). With dt = softplus(dt_raw + dt_bias),
A = -exp(A_log) and a_i the sum of dt_m A over the tokens of a chunk up to i, the state S goes from chunk to chunk and its
gradient R back:

    S' = e^a_last S + sum_j e^(a_last - a_j) dt_j B_j x_j^T        R' = e^a_last R + sum_i e^a_i C_i gy_i^T

`_steps_kernel` makes dt and a; `_own_states_kernel` the sum, for all chunks at once; `_carry_kernel`, in place, adds what
goes on from chunk to chunk: the only place where one chunk waits for another. A sequence of one chunk needs the first
alone, one of two chunks no third. What they cost stands in `scan` and `scan_backward`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .tiles import FUSED

#: Tokens of a chunk. Fixed, not tuned: it gives the states their shape, which the backward and whoever records the
#: program must know. Half of it doubles the traffic of states, twice of it adds half as much arithmetic.
CHUNK = 128

#: Tokens of a tile: what a program holds at a time, in both directions; fewer of them where they are wide, see `shapes_of`.
TILE = 64

#: How fp32 is multiplied: "ieee" meets the reference, "tf32" is faster by far.
FP32_PRODUCTS = "ieee"

#: Arguments of a kernel on which its best launch depends.
KEY = ["N", "P", "CHUNK", "bucket"]

#: Arguments whose values make no better program: another length is no reason to compile again.
UNSPECIALISED = ["length", "between", "bucket"]


@triton.jit
def _softplus(z):
    # log(1 + e) = 2 artanh(e / (2 + e)) keeps all digits of small e, where log(1 + e) has none; e <= 1 bounds the series.
    e = tl.exp(-tl.abs(z))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 / 15 + q * (1.0 / 17)
    series = 1.0 / 11 + q * (1.0 / 13 + q * series)
    series = 1.0 / 7 + q * (1.0 / 9 + q * series)
    series = 1.0 / 3 + q * (1.0 / 5 + q * series)
    return tl.maximum(z, 0.0) + 2.0 * s * (1.0 + q * series)


@triton.jit
def _steps_kernel(
    dt_raw,
    dt_bias,
    A_log,
    dt,
    a,
    raw_b,
    raw_l,
    raw_h,
    length,
    heads,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """dt and a, ``[batch, H, L]`` fp32, of a chunk for a block of heads."""
    batch = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    h = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    there = (t < length)[:, None] & (h < heads)[None, :]
    raw = dt_raw + batch * raw_b + t.to(tl.int64)[:, None] * raw_l + h[None, :] * raw_h
    bias = tl.load(dt_bias + h, mask=h < heads, other=0.0).to(tl.float32)
    rate = -tl.exp(tl.load(A_log + h, mask=h < heads, other=0.0).to(tl.float32))
    step = _softplus(tl.load(raw, mask=there, other=0.0).to(tl.float32) + bias[None, :])
    at = (batch * heads + h)[None, :] * length + t[:, None]
    tl.store(dt + at, step, mask=there)
    tl.store(a + at, tl.cumsum(step * rate[None, :], axis=0), mask=there)


@tuning.autotune(
    [triton.Config({}, num_warps=w, num_stages=s) for w, s in ((4, 2), (4, 1), (8, 2), (8, 1))],
    key=KEY,
)
@triton.jit(do_not_specialize=UNSPECIALISED)
def _own_states_kernel(
    left,
    right,
    dt,
    a,
    states,
    left_b,
    left_l,
    right_b,
    right_l,
    right_h,
    length,
    heads,
    between,
    bucket,  # noqa: ARG001 it stands in the key of tuning alone
    REVERSED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Into slot k of ``states [batch, between, H, N, P]``: the sum over the tokens of a chunk of weight left right^T.

    Forward it is chunk k, left B, right x, the weight e^(a_last - a_j) dt_j. Reversed, for the gradients of states, it is
    chunk k + 1, left C, right the gradient of y, the weight e^a_i.
    """
    h = tl.program_id(0)
    slot = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    start = (slot + REVERSED) * CHUNK
    steps = (batch * heads + h) * length
    if not REVERSED:
        last = tl.load(a + steps + start + CHUNK - 1)
    state = tl.full([N, P], 0.0, tl.float32)
    for first in range(0, CHUNK, TILE):
        t = start + first + tl.arange(0, TILE)
        there = t < length
        row = t.to(tl.int64)[:, None]
        left_t = tl.load(left + batch * left_b + row * left_l + n[None, :], mask=there[:, None], other=0.0)
        right_t = tl.load(right + batch * right_b + row * right_l + h * right_h + p[None, :], mask=there[:, None], other=0.0)
        a_t = tl.load(a + steps + t, mask=there, other=0.0)
        if REVERSED:
            weight = tl.exp(a_t)
        else:
            weight = tl.exp(last - a_t) * tl.load(dt + steps + t, mask=there, other=0.0)
        weighted = (left_t.to(tl.float32) * weight[:, None]).to(OPERAND)
        state += tl.dot(tl.trans(weighted), right_t.to(OPERAND), input_precision=PRECISION)
    at = ((batch * between + slot) * heads + h) * (N * P) + n[:, None] * P + p[None, :]
    tl.store(states + at, state)


@triton.jit
def _carry_kernel(
    states,
    a,
    length,
    heads,
    between,
    REVERSED: tl.constexpr,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In place: each slot takes what came through the slot before it (reversed: behind it), decayed over one chunk."""
    h = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    across = heads * SIZE
    whole = a + (batch * heads + h) * length + CHUNK - 1  # of the chunk between two slots: its last token
    first = batch * between
    if REVERSED:
        first += between - 1
        whole += (between - 1) * CHUNK
    else:
        whole += CHUNK
    at = states + (first * heads + h) * SIZE + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    state = tl.load(at)
    # Stages: the next slots are on their way while this one waits for nothing but a multiplication.
    for _ in tl.range(1, between, num_stages=4):
        if REVERSED:
            at -= across
        else:
            at += across
        state = tl.exp(tl.load(whole)) * state + tl.load(at)
        tl.store(at, state)
        if REVERSED:
            whole -= CHUNK
        else:
            whole += CHUNK


def states_between(length: int, chunk: int = CHUNK) -> int:
    """How many states are kept of a sequence: those between its chunks."""
    return (length - 1) // chunk


def shapes_of(x: Tensor, B: Tensor, chunk: int) -> dict[str, Any]:
    """The compile-time arguments that kernels share."""
    N, P = B.shape[-1], x.shape[-1]
    # So that a tile of a matrix takes 8 KiB of shared memory, where the backward holds a dozen of them.
    tile = TILE * 128 // max(128, max(N, P) * x.element_size())
    return dict(
        CHUNK=chunk,
        TILE=min(tile, chunk),
        N=N,
        P=P,
        OPERAND=tuning.operand(x.dtype),
        PRECISION=FP32_PRODUCTS,
        **FUSED,
    )


def step_sizes(dt_raw: Tensor, dt_bias: Tensor, A_log: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """dt and the cumulated log decays a, which start anew with each chunk: both ``[batch, H, L]`` fp32."""
    batch, length, heads = dt_raw.shape
    dt = torch.empty((batch, heads, length), dtype=torch.float32, device=dt_raw.device)
    a = torch.empty_like(dt)
    grid = (triton.cdiv(heads, 16), triton.cdiv(length, chunk), batch)
    _steps_kernel[grid](
        dt_raw, dt_bias, A_log, dt, a, *dt_raw.stride(), length, heads, CHUNK=chunk, HEADS=16, num_warps=4, **FUSED
    )  # fmt: skip
    return dt, a


def carried_states(
    left: Tensor, right: Tensor, dt: Tensor, a: Tensor, shapes: dict[str, Any], *, reverse: bool = False
) -> Tensor:
    """The state between each two chunks; reversed, the gradients of those states.

    Args:
        left: ``[batch, L, N]``: B, reversed C.
        right: ``[batch, L, H, P]``: x, reversed the gradient of y.
        dt: ``[batch, H, L]`` of `step_sizes`.
        a: as dt.
        shapes: of `shapes_of`.
        reverse: from the last chunk to the first.

    Returns:
        ``[batch, chunks - 1, H, N, P]`` fp32.
    """
    batch, length, heads, P = right.shape
    N, chunk = left.shape[-1], shapes["CHUNK"]
    between = states_between(length, chunk)
    states = torch.empty((batch, between, heads, N, P), dtype=torch.float32, device=right.device)
    if between:
        _own_states_kernel[heads, between, batch](
            left, right, dt, a, states, *left.stride()[:2], *right.stride()[:3], length, heads, between,
            tuning.bucket(batch * length), REVERSED=int(reverse), **shapes,
        )  # fmt: skip
    if between > 1:
        block = min(512, N * P)
        _carry_kernel[N * P // block, heads, batch](
            states,
            a,
            length,
            heads,
            between,
            REVERSED=int(reverse),
            CHUNK=chunk,
            SIZE=N * P,
            BLOCK=block,
            num_warps=2,
            **FUSED,
        )
    return states
