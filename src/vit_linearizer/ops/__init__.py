"""Pure functions on tensors, and the only place that chooses between their implementations.

The plain ones run on any device, forward and backward, and are what programs that leave PyTorch hold; `native` ones take
over on a CPU, those of `gpu` on a CUDA device. All but the products of matrices are leaves for FX (timm's
``register_notrace_function``): a graph shows them as single calls, whatever runs inside.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor

from ..contracts import UserError, did_you_mean
from . import gpu, mixer, native, norm, onednn, packed_weights, reading_order
from .causal_conv import causal_conv_silu
from .linear_attention import linear_attention
from .position_embedding import resample_position_embedding
from .recording import exporting, recording, transformed
from .ssd_chunked import ssd_chunked, ssd_plain
from .ssd_reference import ssd_reference

Implementation = Literal["auto", "reference", "chunked", "native", "triton"]

_SCANS = {"reference": ssd_reference, "chunked": ssd_chunked}


def choose_mixer(device: torch.device) -> tuple[str, str]:
    """The mixer core that ``auto`` means on a device, and why.

    Returns:
        Name of the implementation and one line of reason, as ``doctor`` shows it.
    """
    if device.type == "cpu":
        there, reason = native.status()
        if there:
            return "native", "C++ built for this CPU"
        return "chunked", f"plain PyTorch; the native one is not here: {reason}"
    if device.type == "cuda":
        there, reason = gpu.status()
        return ("triton", reason) if there else ("chunked", f"plain PyTorch; Triton's is not here: {reason}")
    return "chunked", f"plain PyTorch batched matrix products; runs on any device, here {device.type}"


def takes_native(implementation: str, x: Tensor) -> bool:
    """Whether these activations go to native operators.

    Raises:
        UserError: ``native`` is asked for and not here.
    """
    if implementation == "native" and not native.available():
        raise UserError("implementation", "native", f"not here: {native.status()[1]}")
    return implementation in ("auto", "native") and native.serves(x)


def takes_triton(implementation: str, x: Tensor) -> bool:
    """Whether these activations go to Triton's operators.

    Raises:
        UserError: ``triton`` is asked for and not here.
    """
    if implementation == "triton" and not gpu.available():
        raise UserError("implementation", "triton", f"not here: {gpu.status()[1]}")
    return implementation in ("auto", "triton") and gpu.serves_sequences(x)


@register_notrace_function
def mixer_core(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    eps: float,
    state_dim: int,
    head_dim: int,
    implementation: str = "auto",
    state: Tensor | None = None,
    lead: int = 0,
) -> Tensor:
    """All of a Mamba-2 mixer between its two linear layers: convolution, scan, skip, gate and norm.

    Source: Mamba-2 (arXiv 2405.21060); the equations stand in `ops.mixer`.

    Args:
        zxbcdt: ``[batch, L, columns]``, what ``in_proj`` gives: gate, x, B, C, dt.
        conv_weight: ``[inner + 2 * state_dim, 1, width]``.
        conv_bias: ``[inner + 2 * state_dim]``, or None.
        dt_bias: ``[heads]``.
        A_log: ``[heads]``.
        D: ``[heads]``.
        norm_weight: ``[inner]`` with inner = heads * ``head_dim``.
        eps: of the norm.
        state_dim: size of the state per channel.
        head_dim: channels of a head.
        implementation: ``auto`` for `choose_mixer`'s choice, or one by name, see `Implementation`; ``native`` and ``triton``
            differ from ``auto`` in that they must be there.
        state: natively and without gradients only, ``[batch, heads, state_dim, head_dim]`` fp32: the scan's state before
            the first token and, written in place, after the last.
        lead: likewise: so many first tokens are known to the convolution alone, and nothing comes out for them.

    Returns:
        ``[batch, L - lead, inner]`` in the dtype of ``zxbcdt``.

    Raises:
        UserError: there is no such implementation, or it is not here.
    """
    if torch.jit.is_scripting():
        return _plain_mixer_core(
            zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps, state_dim, head_dim, "chunked"
        )
    else:  # a branch that TorchScript leaves out
        parameters = (conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
        native_fits = mixer_carries_states(zxbcdt, conv_weight, conv_bias, state_dim, head_dim, implementation)
        if native_fits and not transformed(*parameters):
            return native.mixer_core(zxbcdt, *parameters, eps, state=state, lead=lead)
        triton_fits = gpu.fits_mixer(conv_weight, conv_bias, state_dim, head_dim) and takes_triton(implementation, zxbcdt)
        if triton_fits and state is None and not lead and not transformed(*parameters):
            return gpu.mixer_core(zxbcdt, *parameters, eps)
        if state is not None or lead:
            raise UserError("implementation", implementation, "carries no state from call to call: only native does")
        return _plain_mixer_core(zxbcdt, *parameters, eps, state_dim, head_dim, implementation)


def mixer_carries_states(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    state_dim: int,
    head_dim: int,
    implementation: str,
) -> bool:
    """Whether `mixer_core` runs natively for these, which is what can carry a state from call to call."""
    return native.fits_mixer(conv_weight, conv_bias, state_dim, head_dim) and takes_native(implementation, x)


def _plain_mixer_core(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    eps: float,
    state_dim: int,
    head_dim: int,
    implementation: str,
) -> Tensor:
    z, x, dt, A, B, C = mixer.scan_inputs(zxbcdt, conv_weight, conv_bias, dt_bias, A_log, state_dim, head_dim)
    y = ssd(
        x, dt, A, B, C, D.to(dt.dtype), implementation="auto" if implementation in ("native", "triton") else implementation
    )
    return rms_norm(y.flatten(2), norm_weight, eps, z)


@register_notrace_function
def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, implementation: str = "auto") -> Tensor:
    """The Mamba-2 scan alone; shapes as in `ssd_reference`.

    Programs that leave PyTorch (TorchScript, export) always get the plain form, whatever is installed or asked for.

    Args:
        x: as in `ssd_reference`, and the tensors after it.
        dt: as there.
        A: as there.
        B: as there.
        C: as there.
        D: as there.
        implementation: ``auto`` (chunked) or ``reference`` or ``chunked``.

    Raises:
        UserError: there is no implementation of that name.
    """
    if torch.jit.is_scripting():
        return ssd_plain(x, dt, A, B, C, D, at_once=False)
    else:  # a branch that TorchScript leaves out
        if exporting():
            return ssd_plain(x, dt, A, B, C, D, at_once=True)
        return _scan(x, dt, A, B, C, D, implementation)


def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, implementation: str) -> Tensor:
    name = "chunked" if implementation == "auto" else implementation
    if name not in _SCANS:
        known = get_args(Implementation)
        raise UserError("implementation", name, f"choose from {', '.join(known)}{did_you_mean(name, known)}")
    return _SCANS[name](x, dt, A, B, C, D)


@register_notrace_function
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, gate: Tensor | None = None) -> Tensor:
    """Normalise the last dimension by its root mean square, in fp32 or better; the equation stands in `ops.norm`.

    Args:
        x: ``[..., D]``.
        weight: ``[D]``.
        eps: added to the mean square.
        gate: ``[..., D]``; where given, ``x`` is first multiplied by ``SiLU(gate)``.

    Returns:
        ``[..., D]`` in the dtype of ``x``.
    """
    if torch.jit.is_scripting():
        return norm.rms_norm(x, weight, eps, gate)
    else:
        if gate is None and not transformed(weight):
            if native.serves_rows(x):
                return native.rms_norm(x, weight, eps)
            if gpu.serves_rows(x):
                return gpu.rms_norm(x, weight, eps)
        return norm.rms_norm(x, weight, eps, gate)


@register_notrace_function
def silu_mul(gate: Tensor, x: Tensor) -> Tensor:
    """``SiLU(gate) * x``, the middle of SwiGLU; both of one shape."""
    if torch.jit.is_scripting():
        return F.silu(gate) * x
    else:
        if gate.dtype == x.dtype and native.serves_rows(gate, x):
            return native.silu_mul(gate, x)
        if gate.dtype == x.dtype and gpu.serves_rows(gate, x):
            return gpu.silu_mul(gate, x)
        return F.silu(gate) * x


@register_notrace_function
def to_reading_order(x: Tensor, flip: bool) -> Tensor:
    """``[B, N + 1, D] -> [B, N + 2, D]``: mean, patches (reversed with ``flip``), class token."""
    if torch.jit.is_scripting():
        return reading_order.to_reading_order(x, flip)
    else:
        if native.serves_rows(x):
            return native.to_reading_order(x, flip)
        if gpu.serves_rows(x):
            return gpu.to_reading_order(x, flip)
        return reading_order.to_reading_order(x, flip)


@register_notrace_function
def add_from_reading_order(x: Tensor, mixed: Tensor, flip: bool) -> Tensor:
    """``x`` plus what a block made of `to_reading_order`'s tokens, each in its own place; shapes as there."""
    if torch.jit.is_scripting():
        return reading_order.add_from_reading_order(x, mixed, flip)
    else:
        if native.serves_rows(x, mixed):
            return native.add_from_reading_order(x, mixed, flip)
        if gpu.serves_rows(x, mixed):
            return gpu.add_from_reading_order(x, mixed, flip)
        return reading_order.add_from_reading_order(x, mixed, flip)


@register_notrace_function
def norm_to_reading_order(x: Tensor, weight: Tensor, eps: float, flip: bool) -> Tensor:
    """`to_reading_order` of `rms_norm`: what the mixer of a block of Adventurer (arXiv 2410.07599) reads.

    On a GPU this is one pass, and under autocast what was fp32 comes out in the dtype that linear layers would cast it to.

    Args:
        x: ``[B, N + 1, D]``: patches, class token.
        weight: ``[D]``.
        eps: added to the mean square.
        flip: whether the patches are reversed.

    Returns:
        ``[B, N + 2, D]``: mean, patches, class token, all of the normalised tokens.
    """
    if torch.jit.is_scripting():
        return to_reading_order(rms_norm(x, weight, eps), flip)
    else:
        if gpu.serves_rows(x) and not transformed(weight):
            return gpu.norm_to_reading_order(x, weight, eps, flip)
        return to_reading_order(rms_norm(x, weight, eps), flip)


@register_notrace_function
def add_and_norm(x: Tensor, mixed: Tensor, weight: Tensor, eps: float, flip: bool) -> tuple[Tensor, Tensor]:
    """`add_from_reading_order` and its `rms_norm`: what a block of Adventurer (arXiv 2410.07599) hands to its MLP.

    On a GPU this is one pass, with autocast as in `norm_to_reading_order`.

    Args:
        x: ``[B, N + 1, D]``: patches, class token.
        mixed: ``[B, N + 2, D]`` in reading order.
        weight: ``[D]``.
        eps: added to the mean square.
        flip: whether the patches of ``mixed`` are reversed.

    Returns:
        The sum and its norm, ``[B, N + 1, D]`` each.
    """
    if torch.jit.is_scripting():
        added = add_from_reading_order(x, mixed, flip)
        return added, rms_norm(added, weight, eps)
    else:
        if gpu.serves_rows(x, mixed) and not transformed(weight):
            return gpu.add_and_norm(x, mixed, weight, eps, flip)
        added = add_from_reading_order(x, mixed, flip)
        return added, rms_norm(added, weight, eps)


@register_notrace_function
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, by whichever library multiplies fp32 matrices faster on this CPU."""
    if torch.jit.is_scripting():
        return F.linear(x, weight, bias)
    else:
        if not recording() and onednn.serves(x, weight, bias):
            return onednn.onednn_linear(x, packed_weights.kept(weight, x.numel() // x.shape[-1]), bias)
        return F.linear(x, weight, bias)


for _leaf in (causal_conv_silu, linear_attention, resample_position_embedding):
    register_notrace_function(_leaf)

__all__ = [
    "Implementation",
    "add_and_norm",
    "add_from_reading_order",
    "causal_conv_silu",
    "choose_mixer",
    "exporting",
    "gpu",
    "linear",
    "linear_attention",
    "mixer_carries_states",
    "mixer_core",
    "norm_to_reading_order",
    "onednn",
    "packed_weights",
    "resample_position_embedding",
    "rms_norm",
    "silu_mul",
    "ssd",
    "ssd_chunked",
    "ssd_reference",
    "takes_native",
    "takes_triton",
    "to_reading_order",
]
