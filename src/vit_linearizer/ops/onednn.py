"""Linear layers by oneDNN, on CPUs and in precisions where it beats what PyTorch would do.

PyTorch hands fp32 products to MKL, which is slower on CPUs that are not Intel's than oneDNN, which it uses for bf16 anyway.
oneDNN takes the weights as they are, and faster packed (`packed_weights`). The figures are in LOG.md. oneDNN keeps what it
prepares for each number of rows, up to a limit of its own.
"""

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .recording import transformed

_THERE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_HAS_BF16 = _THERE and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def prefers_onednn() -> bool:
    """Whether oneDNN multiplies fp32 matrices faster here: measured on AMD CPUs, where PyTorch would use MKL."""
    if not torch.backends.mkl.is_available():
        return False
    try:
        vendor = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("vendor_id")[2].partition("\n")[0]
    except OSError:
        return False
    return "AuthenticAMD" in vendor


def _gains(dtype: torch.dtype) -> bool:
    return (dtype == torch.bfloat16 and _HAS_BF16) or (dtype == torch.float32 and prefers_onednn())


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `onednn_linear` may take these and gains: fp32 on some CPUs; bf16, whose bias PyTorch would copy first.

    Not under autocast, and not where a gradient is wanted.
    """
    return (
        x.device.type == "cpu"
        and type(weight) in (Tensor, torch.nn.Parameter)  # others only look like what they say
        and x.dtype == weight.dtype
        and (bias is None or bias.dtype == x.dtype)
        and _gains(x.dtype)
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)))
        and not transformed(x, weight, bias)
        and x.numel() > 0
        and _THERE
    )


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` by oneDNN; without gradients. The weight may have been through `pack`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def packs(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `pack` pays for a layer that is called several times over: oneDNN will multiply by it, without gradients."""
    return (
        weight.device.type == "cpu"
        and type(weight) in (Tensor, torch.nn.Parameter)
        and _gains(weight.dtype)
        and (bias is None or bias.dtype == weight.dtype)
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_grad_enabled()
        and _THERE
    )


def pack(weight: Tensor, rows: int) -> Tensor:
    """A copy laid out as oneDNN likes it best for products with so many rows. It knows nothing of later edits."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)


if _THERE and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _(x: Any, weight: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(x) * weight[0]
