"""Pure functions on tensors, and the only place that chooses between their implementations.

The scan, the convolution and the norms are leaves for FX (timm's ``register_notrace_function``): a graph shows them as
single calls, whatever runs inside.
"""

from typing import Literal, get_args

import torch
from timm.layers import register_notrace_function
from torch import Tensor

from ..contracts import UserError, did_you_mean
from .causal_conv import causal_conv_silu
from .position_embedding import resample_position_embedding
from .recording import exporting
from .rms_norm import rms_norm
from .ssd_chunked import ssd_chunked, ssd_plain
from .ssd_reference import ssd_reference

Implementation = Literal["auto", "reference", "chunked"]

_SCANS = {"reference": ssd_reference, "chunked": ssd_chunked}


def choose_scan(device: torch.device) -> tuple[str, str]:
    """The scan that ``auto`` means on a device, and why.

    Returns:
        Name of the implementation and one line of reason, as ``doctor`` shows it.
    """
    return "chunked", f"plain PyTorch batched matrix products; runs on any device, here {device.type}"


@register_notrace_function
def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, implementation: str = "auto") -> Tensor:
    """The Mamba-2 scan; shapes as in `ssd_reference`.

    Programs that leave PyTorch (TorchScript, export) always get the plain form, whatever is installed or asked for.

    Args:
        x: as in `ssd_reference`, and the tensors after it.
        dt: as there.
        A: as there.
        B: as there.
        C: as there.
        D: as there.
        implementation: ``auto`` for `choose_scan`'s choice, or one by name, see `Implementation`.

    Raises:
        UserError: there is no implementation of that name.
    """
    if torch.jit.is_scripting():
        return ssd_plain(x, dt, A, B, C, D, at_once=False)
    else:  # a branch that TorchScript leaves out
        if exporting():
            return ssd_plain(x, dt, A, B, C, D, at_once=True)
        return _dispatch(x, dt, A, B, C, D, implementation)


def _dispatch(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, implementation: str) -> Tensor:
    name = choose_scan(x.device)[0] if implementation == "auto" else implementation
    if name not in _SCANS:
        known = get_args(Implementation)
        raise UserError("implementation", name, f"choose from {', '.join(known)}{did_you_mean(name, known)}")
    return _SCANS[name](x, dt, A, B, C, D)


for _leaf in (causal_conv_silu, rms_norm, resample_position_embedding):
    register_notrace_function(_leaf)

__all__ = [
    "Implementation",
    "causal_conv_silu",
    "choose_scan",
    "resample_position_embedding",
    "rms_norm",
    "ssd",
    "ssd_chunked",
    "ssd_reference",
]
