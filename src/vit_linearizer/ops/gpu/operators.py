"""The GPU's operators, and when they serve: on CUDA devices with Triton, outside programs that leave PyTorch."""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from ..recording import exporting, transformed
from .registration import INTERPRETED, OPS

#: Sizes of states and heads that the scan's kernels are written for.
_SIZES = (16, 32, 64, 128)
_WIDEST_CONVOLUTION = 4
#: Columns of a row that one program holds.
_MOST_COLUMNS = 8192
#: A grid's third dimension is counted in 16 bits.
_MOST_SEQUENCES = 65535


@functools.cache
def status() -> tuple[bool, str]:
    """Whether the kernels can run, and one line that says why or why not."""
    if os.environ.get("VIT_LINEARIZER_TRITON", "1") == "0":
        return False, "switched off by VIT_LINEARIZER_TRITON=0"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed; it comes with PyTorch for CUDA on Linux"
    if INTERPRETED:
        return True, "Triton's interpreter, for tests"
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False, "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return False, f"the device is of compute capability {major}.{minor}; the kernels want 8.0 or higher"
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
        driver.active.utils  # noqa: B018  # built by a C compiler on first use
    except Exception as error:  # whatever an incomplete installation trips over
        return False, f"Triton cannot start: {' '.join(str(error).split())[:200] or type(error).__name__}"
    return True, "Triton kernels, compiled on first use"


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether these operators can be called."""
    return status()[0]


def serves(*activations: Tensor) -> bool:
    """Whether these operators may take these tensors."""
    device = "cpu" if INTERPRETED else "cuda"
    return (
        all(x.device.type == device and x.dtype in (torch.float32, torch.bfloat16, torch.float16) for x in activations)
        and activations[0].numel() > 0
        and not exporting()
        and not transformed(*activations)
        and available()
    )


def serves_rows(*activations: Tensor) -> bool:
    """`serves` for the operators that work on rows."""
    return activations[0].shape[-1] <= _MOST_COLUMNS and serves(*activations)


def serves_sequences(x: Tensor) -> bool:
    """`serves` for the mixer's core."""
    return serves(x) and x.shape[0] <= _MOST_SEQUENCES  # in this order: an export must not be asked for its batch


def fits_mixer(conv_weight: Tensor, conv_bias: Tensor | None, state_dim: int, head_dim: int) -> bool:
    """Whether `mixer_core` is written for a mixer of this shape."""
    inner = conv_weight.shape[0] - 2 * state_dim
    width = conv_weight.shape[-1]
    sizes = state_dim in _SIZES and head_dim in _SIZES and inner <= _MOST_COLUMNS
    return sizes and width <= _WIDEST_CONVOLUTION and conv_bias is not None


def mixer_core(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> Tensor:
    """`ops.mixer_core`, in Triton; the arguments as there."""
    arguments = (zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
    tensors = [t.contiguous() for t in arguments if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return OPS.mixer_core_keeping(*tensors, eps)[0]
    return OPS.mixer_core(*tensors, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm` without a gate, in Triton."""
    return OPS.rms_norm(x, weight.contiguous(), eps)


def silu_mul(gate: Tensor, x: Tensor) -> Tensor:
    """`ops.silu_mul`, in Triton."""
    return OPS.silu_mul(gate, x)


def to_reading_order(x: Tensor, flip: bool) -> Tensor:
    """`ops.to_reading_order`, in Triton."""
    return OPS.to_reading_order(x, flip)


def add_from_reading_order(x: Tensor, mixed: Tensor, flip: bool) -> Tensor:
    """`ops.add_from_reading_order`, in Triton."""
    return OPS.add_from_reading_order(x, mixed, flip)


def norm_to_reading_order(x: Tensor, weight: Tensor, eps: float, flip: bool) -> Tensor:
    """`ops.norm_to_reading_order`, in Triton."""
    return OPS.norm_to_reading_order(x, weight.contiguous(), eps, flip, _dtype_for_linear(x, x.dtype))[0]


def add_and_norm(x: Tensor, mixed: Tensor, weight: Tensor, eps: float, flip: bool) -> tuple[Tensor, Tensor]:
    """`ops.add_and_norm`, in Triton."""
    dtype = _dtype_for_linear(x, torch.promote_types(x.dtype, mixed.dtype))
    added, out, _ = OPS.add_and_norm(x, mixed, weight.contiguous(), eps, flip, dtype)
    return added, out


def _dtype_for_linear(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What autocast has a linear layer make of a tensor of this dtype on the device of ``x``; rounding twice is avoided."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if dtype == torch.float32 and torch.is_autocast_enabled(device) else dtype
