"""The native operators, and when they serve: on a CPU, in fp32 or bf16, outside programs that leave PyTorch."""

import logging
import os
import threading

import torch
from torch import Tensor

from ..recording import exporting, transformed
from .build import BuildError, load_library
from .registration import OPS

logger = logging.getLogger("vit_linearizer")

#: What the kernels are written for; every published Adventurer is so.
STATE_DIM = HEAD_DIM = 64
CONV_WIDTH = 4

#: Columns in which rows are worked on; a multiple of every machine's vector.
_LANES = 16


_lock = threading.Lock()
_found: tuple[bool, str] | None = None


def status(*, retry: bool = False) -> tuple[bool, str]:
    """Whether the native library is here, building it if need be, and one line that says where or why not.

    Args:
        retry: try again what failed before, in this process or another.
    """
    global _found
    with _lock:
        if _found is None or (retry and not _found[0]):
            _found = _look_for_library(retry)
        return _found


def _look_for_library(retry: bool) -> tuple[bool, str]:
    if os.environ.get("VIT_LINEARIZER_NATIVE", "1") == "0":
        return False, "switched off by VIT_LINEARIZER_NATIVE=0"
    try:
        return True, str(load_library(retry=retry))
    except BuildError as error:
        logger.warning("no native CPU kernels, the plain path is slower: %s", error)
        return False, str(error)


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether native operators can be called; the first call may build them."""
    return status()[0]


def serves(*activations: Tensor) -> bool:
    """Whether native operators may take these tensors."""
    return (
        all(x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) for x in activations)
        and activations[0].numel() > 0
        and not exporting()
        and not transformed(*activations)
        and available()
    )


def serves_rows(*activations: Tensor) -> bool:
    """`serves` for the operators that work on rows, whose length must fill vectors."""
    return activations[0].shape[-1] % _LANES == 0 and serves(*activations)


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether anything has to be differentiated through a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def fits_mixer(conv_weight: Tensor, conv_bias: Tensor | None, state_dim: int, head_dim: int) -> bool:
    """Whether `mixer_core` is written for a mixer of this shape."""
    sizes = (state_dim, head_dim, conv_weight.shape[-1])
    return sizes == (STATE_DIM, HEAD_DIM, CONV_WIDTH) and conv_bias is not None


def mixer_core(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    eps: float,
    *,
    state: Tensor | None = None,
    lead: int = 0,
) -> Tensor:
    """`ops.mixer_core`, natively; the arguments as there.

    Args:
        zxbcdt: as there, and the tensors after it.
        conv_weight: as there.
        conv_bias: as there.
        dt_bias: as there.
        A_log: as there.
        D: as there.
        norm_weight: as there.
        eps: as there.
        state: without gradients only, ``[batch, heads, 64, 64]`` fp32: the scan's state before the first token and, written
            in place, after the last; by default zero and forgotten.
        lead: with a state only: so many first tokens are known to the convolution alone, and nothing comes out for them.
    """
    arguments = (zxbcdt.contiguous(), conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
    if wants_gradients(*arguments):
        if state is not None or lead:
            raise ValueError("a state is carried without gradients only; call this under torch.no_grad()")
        return OPS.mixer_core_keeping(*arguments, eps)[0]
    if state is None:
        assert lead == 0
        return OPS.mixer_core(*arguments, eps)
    return OPS.mixer_core_carrying(*arguments, eps, state, lead)


def fingerprint(t: Tensor) -> int:
    """A number of 64 bits that changes with the contents of a contiguous tensor, computed as fast as they can be read."""
    return OPS.fingerprint(t.detach())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm` without a gate, natively."""
    return OPS.rms_norm(x.contiguous(), weight, eps)


def silu_mul(gate: Tensor, x: Tensor) -> Tensor:
    """`ops.silu_mul`, natively."""
    return OPS.silu_mul(gate.contiguous(), x.contiguous())


def to_reading_order(x: Tensor, flip: bool) -> Tensor:
    """`ops.to_reading_order`, natively."""
    return OPS.to_reading_order(x.contiguous(), flip)


def add_from_reading_order(x: Tensor, mixed: Tensor, flip: bool) -> Tensor:
    """`ops.add_from_reading_order`, natively."""
    return OPS.add_from_reading_order(x.contiguous(), mixed.contiguous(), flip)
