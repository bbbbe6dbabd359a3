"""RMSNorm, plain and gated by SiLU.

Source: Adventurer (arXiv 2410.07599) uses the plain form around its mixers; Mamba-2 (arXiv 2405.21060) gates the scan's
output before normalising it:

    v = x * SiLU(gate)        y = v / sqrt(mean(v^2) + eps) * weight
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .recording import recording


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, gate: Tensor | None = None) -> Tensor:
    """Normalise the last dimension by its root mean square, in fp32 or better.

    Args:
        x: ``[..., D]``.
        weight: ``[D]``.
        eps: added to the mean square.
        gate: ``[..., D]``; where given, ``x`` is first multiplied by ``SiLU(gate)``.

    Returns:
        ``[..., D]`` in the dtype of ``x``.
    """
    if torch.jit.is_scripting():
        return _forward(x, weight, eps, gate)[0]
    else:  # a branch that TorchScript leaves out
        if torch.is_grad_enabled() and not recording():
            return _RMSNorm.apply(x, weight, eps, gate)
        return _forward(x, weight, eps, gate)[0]


def _forward(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    value = _gated(x, gate)
    scale = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return (value * scale * weight).to(x.dtype), scale


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    exact = torch.promote_types(x.dtype, torch.float32)
    return x.to(exact) if gate is None else x.to(exact) * F.silu(gate.to(exact))


class _RMSNorm(torch.autograd.Function):
    """The derivative written out: fewer passes over memory than autograd makes, and only the inputs are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, gate: Tensor | None) -> Tensor:
        y, scale = _forward(x, weight, eps, gate)
        ctx.save_for_backward(x, weight, gate, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, weight, gate, scale = ctx.saved_tensors
        unit = _gated(x, gate).mul_(scale) if gate is not None else _gated(x, gate) * scale
        dy = dy.to(unit.dtype)
        dweight = torch.mul(dy, unit).reshape(-1, weight.shape[0]).sum(0).to(weight.dtype)
        dvalue = dy * weight
        along = torch.mul(dvalue, unit).mean(-1, keepdim=True)
        dvalue = dvalue.addcmul_(unit, along, value=-1).mul_(scale)
        if gate is None:
            return dvalue.to(x.dtype), dweight, None, None
        gate_exact = gate.to(dvalue.dtype)
        dgate = torch.ops.aten.silu_backward(dvalue * x, gate_exact)
        return dvalue.mul_(F.silu(gate_exact)).to(x.dtype), dweight, None, dgate.to(gate.dtype)
