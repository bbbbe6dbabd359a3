"""The core of a Mamba-2 mixer on a GPU, forward and backward: convolution, scan and gated norm as three groups of kernels.

Source: `ops.mixer_core`, which it must equal. Nothing is split, copied or expanded between them: each reads and writes
columns of ``zxbcdt`` and of its gradient. Kept for the derivative are y, the states between chunks and the norm's scale;
the convolution is computed again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .conv import conv_silu_backward, conv_silu_forward
from .gate_norm import gate_norm_backward, gate_norm_forward
from .registration import CHUNK
from .scan import scan_forward
from .scan_backward import scan_backward


class _Columns(NamedTuple):
    """What stands where in a row of ``zxbcdt``: z, then x, B and C, then dt."""

    inner: int
    heads: int
    state_dim: int

    def parts(self, zxbcdt: Tensor) -> tuple[Tensor, ...]:
        """Views of z, of x with B and C, and of dt."""
        return zxbcdt.split([self.inner, self.inner + 2 * self.state_dim, self.heads], dim=-1)

    def of_scan(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of x ``[batch, L, heads, P]``, B and C."""
        x, B, C = xBC.split([self.inner, self.state_dim, self.state_dim], dim=-1)
        return x.unflatten(-1, (self.heads, self.inner // self.heads)), B, C


def _columns(conv_weight: Tensor, D: Tensor, norm_weight: Tensor) -> _Columns:
    inner = norm_weight.shape[0]
    return _Columns(inner=inner, heads=D.shape[0], state_dim=(conv_weight.shape[0] - inner) // 2)


def forward(zxbcdt: Tensor, parameters: Sequence[Any], *, keep: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The output, and what `backward` wants of it.

    Args:
        zxbcdt: ``[batch, L, columns]``.
        parameters: ``conv_weight`` to ``norm_weight`` and ``eps``, in the order of `ops.mixer_core`.
        keep: whether a derivative will be asked for.

    Returns:
        ``[batch, L, inner]``; y before gate and norm; the states between chunks, fp32 (None without ``keep``); the norm's
        scale ``[batch, L]``, fp32.
    """
    conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps = parameters
    columns = _columns(conv_weight, D, norm_weight)
    z, xBC, dt = columns.parts(zxbcdt)
    mixed = conv_silu_forward(xBC, conv_weight, conv_bias)
    y, states = scan_forward(*columns.of_scan(mixed), dt, dt_bias, A_log, D, keep_states=keep, chunk=CHUNK)
    y = y.flatten(2)
    out, scale = gate_norm_forward(y, z, norm_weight, eps)
    return out, y, states, scale.view(zxbcdt.shape[:2])


def backward(gout: Tensor, zxbcdt: Tensor, parameters: Sequence[Any], kept: Sequence[Tensor]) -> tuple[Any, ...]:
    """Gradients of ``zxbcdt`` and, in fp32, of the parameters in their order.

    Args:
        gout: of the output.
        zxbcdt: as in `forward`.
        parameters: as there.
        kept: y, states and scale, as they came out there.
    """
    conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, _eps = parameters
    y, states, scale = kept
    columns = _columns(conv_weight, D, norm_weight)
    z, xBC, dt = columns.parts(zxbcdt)
    gzxbcdt = torch.empty_like(zxbcdt)
    gz, gxBC, gdt = columns.parts(gzxbcdt)
    gy, _, gnorm_weight = gate_norm_backward(gout, y, z, norm_weight, scale.flatten(), gz)
    mixed = conv_silu_forward(xBC, conv_weight, conv_bias)
    gmixed = torch.empty_like(mixed)
    gy = gy.unflatten(-1, (columns.heads, -1))
    *_, gdt_bias, gA_log, gD = scan_backward(
        gy, *columns.of_scan(mixed), dt, dt_bias, A_log, D, states, chunk=CHUNK, into=(*columns.of_scan(gmixed), gdt)
    )
    _, gconv_weight, gconv_bias = conv_silu_backward(gmixed, xBC, conv_weight, conv_bias, gxBC)
    return gzxbcdt, gconv_weight, gconv_bias, gdt_bias, gA_log, gD, gnorm_weight
