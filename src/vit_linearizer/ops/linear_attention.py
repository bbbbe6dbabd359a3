"""Linear attention: every token reads one d x d sum per head, in place of all other tokens.

Source: Katharopoulos et al. (arXiv 2006.16236, eqs. 4-6), the "vanilla linear attention" of ViT-AdaLA (arXiv 2603.16063),
non-causal:

    y_i = phi(q_i) S / (phi(q_i) . z),      S = sum_j phi(k_j) v_j^T,      z = sum_j phi(k_j)

It must equal the explicit form, in which token i reads token j with weight phi(q_i) . phi(k_j) over the sum of these
weights, on outputs and gradients.

Both q and k are multiplied by d^-1/4 first (softmax's 1/sqrt(d), split evenly; a choice: ViT-AdaLA does not say), then phi
is taken. Rotary positions belong before all this: they turn q and k, not their features.

Feature maps phi, by name:

- ``elu``: 1 + ELU(x), so 1 + x above zero and exp(x) below (arXiv 2006.16236, eq. 7).
- ``relu``: max(x, 0), as in EfficientViT (arXiv 2205.14756).
- ``hedgehog``: softmax of [x W, -x W] over its 2d entries, with a learnable W per head (arXiv 2402.04347).

The normaliser is kept above 1e-30 (where it is 0, no token is read and y is 0), which matters to ``relu`` alone.
"""

import contextlib
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..contracts import UserError, did_you_mean
from .recording import exporting, recording, transformed

FeatureMap = Literal["elu", "relu", "hedgehog"]

#: Feature maps with parameters.
LEARNABLE = ("hedgehog",)

#: Tokens of a part where nothing as long as the sequence is to be held: what is made of so many, with all heads of a ViT-B,
#: stays near the cache. Few parts do not pay.
_PART = 512

_SMALLEST = 1e-30


def check_feature_map(name: str) -> None:
    """Raise a `UserError` unless there is a feature map of that name."""
    known = get_args(FeatureMap)
    if name not in known:
        raise UserError("feature_map", name, f"choose from {', '.join(known)}{did_you_mean(name, known)}")


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str = "elu",
    q_map: Tensor | None = None,
    k_map: Tensor | None = None,
) -> Tensor:
    """Non-causal linear attention; the equations and the scaling stand at the top of this file.

    Sums over tokens are accumulated in fp32 or better. With bfloat16 the d x d sum is rounded once, when done; float16,
    whose largest number such sums pass, is computed in fp32 throughout.

    Args:
        q: ``[B, heads, M, d]``, not yet scaled, any strides.
        k: ``[B, heads, N, d]``.
        v: ``[B, heads, N, e]``.
        feature_map: see `FeatureMap`.
        q_map: for a learnable feature map, ``[heads, d, d]``: the W of the queries.
        k_map: likewise, of the keys.

    Returns:
        ``[B, heads, M, e]`` in the dtype of ``v``.

    Raises:
        UserError: unknown feature map, or a learnable one without its parameters.
    """
    check_feature_map(feature_map)
    if feature_map in LEARNABLE and (q_map is None or k_map is None):
        raise UserError("feature_map", feature_map, "needs q_map and k_map, [heads, d, d] each")
    with _without_autocast(q.device):
        if _goes_in_parts(q, k, v, q_map, k_map):
            return _in_parts(q, k, v, feature_map, q_map, k_map)
        phi_k = _features(k, feature_map, k_map)
        kv, total = _sums(phi_k, v)
        return _read(_features(q, feature_map, q_map), kv.to(phi_k.dtype), total).to(v.dtype)


def _sums(phi_k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """S ``[B, heads, features, e]`` in the dtype of the products, and z ``[B, heads, features, 1]`` in fp32 or better."""
    exact = torch.promote_types(phi_k.dtype, torch.float32)
    return phi_k.mT @ v.to(phi_k.dtype), phi_k.sum(-2, dtype=exact).unsqueeze(-1)


def _read(phi_q: Tensor, kv: Tensor, total: Tensor) -> Tensor:
    """What each query reads. Dividing the features, not the outputs, loses fewer digits in bfloat16."""
    normaliser = (phi_q @ total.to(phi_q.dtype)).clamp(min=_SMALLEST)
    return (phi_q / normaliser) @ kv


def _goes_in_parts(q: Tensor, k: Tensor, *others: Tensor | None) -> bool:
    if recording() or q.device.type != "cpu" or max(q.shape[-2], k.shape[-2]) <= 4 * _PART:
        return False
    kept = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, *others))
    return not (kept or transformed(q, k, *others))


def _in_parts(q: Tensor, k: Tensor, v: Tensor, feature_map: str, q_map: Tensor | None, k_map: Tensor | None) -> Tensor:
    """The same over parts of the tokens, which stay in the cache from one operator to the next; sums add up in fp32."""
    kv: Any = 0.0
    total: Any = 0.0
    for k_part, v_part in zip(k.split(_PART, -2), v.split(_PART, -2), strict=True):
        kv_part, total_part = _sums(_features(k_part, feature_map, k_map), v_part)
        kv, total = kv + kv_part.to(total_part.dtype), total + total_part
    # Tokens before heads in memory, as the layers around want it.
    out = v.new_empty(v.shape[0], q.shape[2], v.shape[1], v.shape[3]).transpose(1, 2)
    for q_part, out_part in zip(q.split(_PART, -2), out.split(_PART, -2), strict=True):
        phi_q = _features(q_part, feature_map, q_map)
        out_part.copy_(_read(phi_q, kv.to(phi_q.dtype), total))
    return out


def _features(x: Tensor, name: str, weight: Tensor | None) -> Tensor:
    """phi(x d^-1/4), ``[B, heads, N, features]``, in the dtype of the products."""
    x = x.to(torch.float32 if x.dtype == torch.float16 else x.dtype) * x.shape[-1] ** -0.25
    if name == "elu":
        return _one_plus_elu(x)
    if name == "relu":
        return x.relu()
    assert weight is not None
    x = x @ weight.to(x.dtype)
    return torch.cat([x, -x], dim=-1).softmax(-1)


def _one_plus_elu(x: Tensor) -> Tensor:
    if recording() or transformed(x):
        return x.clamp(max=0).exp() + x.relu()
    if torch.is_grad_enabled() and x.requires_grad:
        return _OnePlusELU.apply(x)
    return _one_plus_elu_in_place(x)


def _one_plus_elu_in_place(x: Tensor) -> Tensor:
    # ELU itself is near -1 below zero, and 1 added to that has few digits left.
    return x.clamp(max=0).exp_().add_(x.relu())


class _OnePlusELU(torch.autograd.Function):
    """The derivative is min(phi, 1), so that only phi is kept, which the products keep anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        phi = _one_plus_elu_in_place(x)
        ctx.save_for_backward(phi)
        return phi

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (phi,) = ctx.saved_tensors
        return gradients[0] * phi.clamp(max=1)


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast would take the products to float16; an exported program is no place for its contexts."""
    if device.type == "meta" or exporting() or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
