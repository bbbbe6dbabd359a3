"""The causal depthwise convolution of Mamba-2 with its SiLU on a GPU, and its derivative. Must equal `ops.causal_conv`.

Source: Mamba-2 (arXiv 2405.21060):

    p_t = bias + sum_s weight_s x_{t - width + 1 + s}        y_t = SiLU(p_t)

Backward, per channel, with q_t = gy_t SiLU'(p_t) and p recomputed:

    gx_t = sum_s weight_s q_{t + width - 1 - s}      gweight_s = sum_t q_t x_{t - width + 1 + s}      gbias = sum_t q_t

Floor: 4 bytes a token and channel forward and 6 backward with 16-bit numbers: 7 and 10 kB a token of a base model, whose
1664 channels are columns of a wider tensor and are read where they stand.

Forward, a tile of tokens is read from memory once and from cache again for every tap. Backward that would take a SiLU per
tap, more than the units for exponentials manage meanwhile. There each row of a tile walks through its own stretch of tokens
and keeps the last four inputs and q in registers. Stretches overlap by the tokens at their ends, which come from cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import FUSED, dense, sigmoid, sums_of, unit_of

#: The walk is written out for so many taps; narrower weights count as wide ones that begin with zeros.
TAPS = 4
_TOKENS, _CHANNELS = 32, 64  # a tile of the forward pass
_WALKS, _STRETCH = 16, 16  # stretches that a program of the backward pass walks, and tokens of each at most


@triton.jit
def _forward(
    x, weight, bias, out, x_batch, x_step, length, channels, token_tiles, channel_tiles,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    image = (place // channel_tiles // token_tiles).to(tl.int64)
    token = (place // channel_tiles % token_tiles * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    channel = place % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    x += image * x_batch * UNIT
    out += image * length * channels
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    if bias is not None:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(WIDTH):
        source = token - (WIDTH - 1 - tap)
        there = ((source >= 0) & (source < length))[:, None] & inside[None, :]
        value = tl.load(x + source[:, None] * x_step * UNIT + channel[None, :], mask=there, other=0.0).to(tl.float32)
        total += value * tl.load(weight + channel * WIDTH + tap, mask=inside, other=0.0).to(tl.float32)[None, :]
    to = out + token[:, None] * channels + channel[None, :]
    tl.store(to, total * sigmoid(total), mask=(token < length)[:, None] & inside[None, :])


@triton.jit
def _tap(weight, channel, inside, number: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr):
    """Weights of one of ``TAPS`` taps, zero for those that a narrower convolution has not; ``[1, channels]``."""
    value = tl.zeros(channel.shape, tl.float32)
    if number >= TAPS - WIDTH:
        value += tl.load(weight + channel * WIDTH + (number - (TAPS - WIDTH)), mask=inside, other=0.0).to(tl.float32)
    return value[None, :]


@triton.jit
def _tokens(base, token, step, length, inside):
    """One token of every walk, zero outside the sequence."""
    there = ((token >= 0) & (token < length))[:, None] & inside
    return tl.load(base + token[:, None] * step, mask=there, other=0.0)


@triton.jit
def _backward(
    g, x, weight, bias, gx, sums, g_batch, x_batch, gx_batch, g_step, x_step, gx_step,
    length, channels, walks, parts, stretch, channel_tiles,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, WALKS: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    channel = place % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    of_weight = channel < channels
    walk = place // channel_tiles * WALKS + tl.arange(0, WALKS)
    image = (walk // parts).to(tl.int64)[:, None]
    first = (walk % parts * stretch).to(tl.int64)
    inside = (walk < walks)[:, None] & of_weight[None, :]
    g += image * g_batch * UNIT + channel[None, :]
    x += image * x_batch * UNIT + channel[None, :]
    gx += image * gx_batch * UNIT + channel[None, :]
    g_step, x_step, gx_step = g_step * UNIT, x_step * UNIT, gx_step * UNIT

    w0 = _tap(weight, channel, of_weight, 0, TAPS, WIDTH)
    w1 = _tap(weight, channel, of_weight, 1, TAPS, WIDTH)
    w2 = _tap(weight, channel, of_weight, 2, TAPS, WIDTH)
    w3 = _tap(weight, channel, of_weight, 3, TAPS, WIDTH)
    shift = tl.zeros((1, CHANNELS), tl.float32)
    if bias is not None:
        shift += tl.load(bias + channel, mask=of_weight, other=0.0).to(tl.float32)[None, :]

    x0 = _tokens(x, first - 3, x_step, length, inside).to(tl.float32)
    x1 = _tokens(x, first - 2, x_step, length, inside).to(tl.float32)
    x2 = _tokens(x, first - 1, x_step, length, inside).to(tl.float32)
    next_x = _tokens(x, first, x_step, length, inside)
    next_g = _tokens(g, first, g_step, length, inside)
    q0 = tl.zeros((WALKS, CHANNELS), tl.float32)
    q1, q2 = q0, q0
    sum0, sum1, sum2, sum3, sum_bias = q0, q0, q0, q0, q0
    for at in range(0, stretch + TAPS - 1):
        token = first + at
        x3 = next_x.to(tl.float32)
        grad = next_g.to(tl.float32)
        # Asked for before the store below, behind which no load is moved.
        next_x = _tokens(x, token + 1, x_step, length, inside)
        next_g = _tokens(g, token + 1, g_step, length, inside)
        value = shift + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
        share = sigmoid(value)
        q3 = grad * share * (1.0 + value * (1.0 - share))
        # The last three tokens belong to the next stretch, which counts them.
        own = tl.where(at < stretch, q3, 0.0)
        sum0 += own * x0
        sum1 += own * x1
        sum2 += own * x2
        sum3 += own * x3
        sum_bias += own
        done = token - (TAPS - 1)
        kept = ((done >= first) & (done < length))[:, None] & inside
        tl.store(gx + done[:, None] * gx_step, w3 * q0 + w2 * q1 + w1 * q2 + w0 * q3, mask=kept)
        x0, x1, x2 = x1, x2, x3
        q0, q1, q2 = q1, q2, q3

    sums += (place // channel_tiles).to(tl.int64) * (TAPS + 1) * channels + channel
    tl.store(sums, tl.sum(sum0, 0), mask=of_weight)
    tl.store(sums + channels, tl.sum(sum1, 0), mask=of_weight)
    tl.store(sums + 2 * channels, tl.sum(sum2, 0), mask=of_weight)
    tl.store(sums + 3 * channels, tl.sum(sum3, 0), mask=of_weight)
    tl.store(sums + 4 * channels, tl.sum(sum_bias, 0), mask=of_weight)


def _width(x: Tensor, weight: Tensor) -> int:
    channels, _, width = weight.shape
    if x.shape[-1] != channels:
        raise ValueError(f"weight is for {channels} channels, x has {x.shape[-1]}")
    if width > TAPS:
        raise ValueError(f"width must be at most {TAPS}, not {width}")
    return width


def conv_silu_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Causal depthwise convolution over tokens, then SiLU.

    Args:
        x: ``[batch, L, channels]``, any strides between tokens and between images: columns of a wider tensor.
        weight: ``[channels, 1, width]``, contiguous, width at most 4.
        bias: ``[channels]``, or None.

    Returns:
        ``[batch, L, channels]``, contiguous, in the dtype of ``x``.

    Raises:
        ValueError: ``weight`` is too wide or for another number of channels.
    """
    width = _width(x, weight)
    x = dense(x)
    batch, length, channels = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    unit = unit_of(x.stride(0), x.stride(1))
    token_tiles, channel_tiles = triton.cdiv(length, _TOKENS), triton.cdiv(channels, _CHANNELS)
    _forward[(batch * token_tiles * channel_tiles,)](
        x, weight, bias, out, x.stride(0) // unit, x.stride(1) // unit, length, channels, token_tiles, channel_tiles,
        WIDTH=width, UNIT=unit, TOKENS=_TOKENS, CHANNELS=_CHANNELS, **FUSED,
    )  # fmt: skip
    return out


def conv_silu_backward(
    gout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gx: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The derivative of `conv_silu_forward`.

    Args:
        gout: ``[batch, L, channels]``, any strides between tokens.
        x: as there.
        weight: as there.
        bias: as there.
        gx: ``[batch, L, channels]``, written in place: the part of a larger gradient that belongs to ``x``.

    Returns:
        Gradients of ``x`` (``gx``), of ``weight`` and of ``bias`` (fp32, or None where there is none).

    Raises:
        ValueError: ``weight`` is too wide or for another number of channels, or ``gx`` has gaps between channels.
    """
    width = _width(x, weight)
    if gx.stride(-1) != 1 and gx.shape[-1] != 1:
        raise ValueError(f"gx must have its channels side by side in memory, not strides {gx.stride()}")
    gout, x = dense(gout), dense(x)
    batch, length, channels = x.shape
    parts = triton.cdiv(length, _STRETCH)
    stretch = triton.cdiv(length, max(parts, 1))
    programs, channel_tiles = triton.cdiv(batch * parts, _WALKS), triton.cdiv(channels, _CHANNELS)
    sums = torch.empty(programs, TAPS + 1, channels, dtype=torch.float32, device=x.device)
    batches, steps = ([t.stride(dim) for t in (gout, x, gx)] for dim in (0, 1))
    unit = unit_of(*batches, *steps)
    _backward[(programs * channel_tiles,)](
        gout, x, weight, bias, gx, sums, *(step // unit for step in (*batches, *steps)),
        length, channels, batch * parts, parts, stretch, channel_tiles,
        WIDTH=width, UNIT=unit, WALKS=_WALKS, CHANNELS=_CHANNELS, TAPS=TAPS, **FUSED,
    )  # fmt: skip
    total = sums_of(sums)
    gweight = total[TAPS - width : TAPS].t().contiguous().unsqueeze(1)
    return gx, gweight, total[TAPS].clone() if bias is not None else None
