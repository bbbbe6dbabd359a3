"""The GPU's operators as PyTorch knows them (`ops.registration`, `fused_norms`), and how they run.

Triton is imported by the first call.
"""

import os
from typing import Any

import torch
from torch import Tensor

from ..registration import register
from . import fused_norms

#: Tokens of a chunk of the scan.
CHUNK = 128

_PLAIN = "set VIT_LINEARIZER_TRITON=0"
_LIBRARY, OPS = register("vit_linearizer_gpu", lambda _length: CHUNK, _PLAIN)
fused_norms.register(_LIBRARY, OPS, _PLAIN)

#: Of a mixer: the six tensors and eps.
_PARAMETERS = 7


def _mixer_core(zxbcdt: Tensor, *parameters: Any) -> Tensor:
    from . import mixer

    with torch.cuda.device_of(zxbcdt):
        return mixer.forward(zxbcdt, parameters, keep=False)[0]


def _mixer_core_keeping(zxbcdt: Tensor, *parameters: Any) -> tuple[Tensor, ...]:
    from . import mixer

    with torch.cuda.device_of(zxbcdt):
        return mixer.forward(zxbcdt, parameters, keep=True)  # type: ignore[return-value]  # states are there


def _mixer_core_backward(gout: Tensor, zxbcdt: Tensor, *others: Any) -> tuple[Tensor, ...]:
    from . import mixer

    parameters, (_out, *kept) = others[:_PARAMETERS], others[_PARAMETERS:]
    with torch.cuda.device_of(zxbcdt):
        return mixer.backward(gout, zxbcdt, parameters, kept)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from .gate_norm import rms_norm_forward

    with torch.cuda.device_of(x):
        return rms_norm_forward(x, weight, eps)[0]


def _rms_norm_backward(gout: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from .gate_norm import rms_norm_backward, rms_norm_forward

    with torch.cuda.device_of(x):
        _, scale = rms_norm_forward(x, weight, eps)  # cheaper than keeping it would be simple
        return rms_norm_backward(gout, x, weight, scale)


def _silu_mul(gate: Tensor, x: Tensor) -> Tensor:
    from .swiglu import silu_mul_forward

    with torch.cuda.device_of(x):
        return silu_mul_forward(gate, x)


def _silu_mul_backward(gout: Tensor, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    from .swiglu import silu_mul_backward

    with torch.cuda.device_of(x):
        return silu_mul_backward(gout, gate, x)


def _to_reading_order(x: Tensor, flip: bool) -> Tensor:
    from .reading_order import to_reading_order_forward

    with torch.cuda.device_of(x):
        return to_reading_order_forward(x, flip)


def _to_reading_order_backward(gout: Tensor, flip: bool) -> Tensor:
    from .reading_order import to_reading_order_backward

    with torch.cuda.device_of(gout):
        return to_reading_order_backward(gout, flip)


def _add_from_reading_order(x: Tensor, mixed: Tensor, flip: bool) -> Tensor:
    from .from_reading_order import add_from_reading_order_forward

    with torch.cuda.device_of(x):
        return add_from_reading_order_forward(x, mixed, flip)


def _add_from_reading_order_backward(gout: Tensor, flip: bool) -> Tensor:
    from .from_reading_order import add_from_reading_order_backward

    with torch.cuda.device_of(gout):
        return add_from_reading_order_backward(gout, flip)


def _norm_to_reading_order(x: Tensor, weight: Tensor, eps: float, flip: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from .reading_order import norm_to_reading_order_forward

    with torch.cuda.device_of(x):
        return norm_to_reading_order_forward(x, weight, eps, flip, dtype)  # type: ignore[return-value]  # scale is there


def _norm_to_reading_order_backward(
    gout: Tensor, x: Tensor, weight: Tensor, scale: Tensor, flip: bool
) -> tuple[Tensor, Tensor]:
    from .reading_order import norm_to_reading_order_backward

    with torch.cuda.device_of(x):
        return norm_to_reading_order_backward(gout, x, weight, scale, flip)


def _add_and_norm(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    from .from_reading_order import add_and_norm_forward

    with torch.cuda.device_of(x):
        return add_and_norm_forward(x, *others)


def _add_and_norm_backward(gadded: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    from .from_reading_order import add_and_norm_backward

    with torch.cuda.device_of(gadded):
        return add_and_norm_backward(gadded, *others)


_RUN = {
    "mixer_core": _mixer_core,
    "mixer_core_keeping": _mixer_core_keeping,
    "mixer_core_backward": _mixer_core_backward,
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "silu_mul": _silu_mul,
    "silu_mul_backward": _silu_mul_backward,
    "to_reading_order": _to_reading_order,
    "to_reading_order_backward": _to_reading_order_backward,
    "add_from_reading_order": _add_from_reading_order,
    "add_from_reading_order_backward": _add_from_reading_order_backward,
    "norm_to_reading_order": _norm_to_reading_order,
    "norm_to_reading_order_backward": _norm_to_reading_order_backward,
    "add_and_norm": _add_and_norm,
    "add_and_norm_backward": _add_and_norm_backward,
}
#: Triton's interpreter runs the same kernels on a CPU, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
for _name, _run in _RUN.items():
    _LIBRARY.impl(_name, _run, "CUDA")
    if INTERPRETED:
        _LIBRARY.impl(_name, _run, "CPU")
