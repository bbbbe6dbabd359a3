"""Linear layers in fp32 on CPUs where PyTorch's choice of library is not the best one.

PyTorch hands fp32 products to MKL, which is slower on CPUs that are not Intel's than oneDNN, which it uses for bf16 anyway.
oneDNN takes the weights as they are, and a little faster still packed, which pays where a layer is called several times in a
row. The figures are in LOG.md.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor


@functools.cache
def prefers_onednn() -> bool:
    """Whether oneDNN multiplies fp32 matrices faster here: measured on AMD CPUs, where PyTorch would use MKL."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        vendor = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("vendor_id")[2].partition("\n")[0]
    except OSError:
        return False
    return "AuthenticAMD" in vendor and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `onednn_linear` may take these: fp32 on a CPU that gains by it, outside autocast, no gradient wanted."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)))
        and x.numel() > 0
        and prefers_onednn()
    )


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` by oneDNN; without gradients. The weight may have been through `pack`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def packs(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `pack` pays for a layer that is called several times over: oneDNN will multiply by it, without gradients."""
    return (
        weight.device.type == "cpu"
        and (weight.dtype == torch.bfloat16 or (weight.dtype == torch.float32 and prefers_onednn()))
        and (bias is None or bias.dtype == weight.dtype)
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack(weight: Tensor, rows: int) -> Tensor:
    """A copy laid out as oneDNN likes it best for products with so many rows. It is for one call of a model, never kept."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
