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
    check_maps(feature_map, q_map, k_map)
    return attention_read(q, *attention_sums(k, v, feature_map, k_map), feature_map, q_map).to(v.dtype)


def check_maps(feature_map: str, q_map: Tensor | None, k_map: Tensor | None) -> None:
    """Raise a `UserError` for an unknown feature map, or a learnable one without its parameters."""
    check_feature_map(feature_map)
    if feature_map in LEARNABLE and (q_map is None or k_map is None):
        raise UserError("feature_map", feature_map, "needs q_map and k_map, [heads, d, d] each")


def attention_sums(k: Tensor, v: Tensor, feature_map: str, k_map: Tensor | None) -> tuple[Tensor, Tensor]:
    """S and z of some tokens: all that queries need to know of them. Those of all tokens are the sums of their parts'.

    Args:
        k: ``[B, heads, N, d]``, not yet scaled.
        v: ``[B, heads, N, e]``.
        feature_map: as in `linear_attention`.
        k_map: as there.

    Returns:
        S ``[B, heads, features, e]`` in the dtype of the products, and z ``[B, heads, features, 1]`` in fp32 or better.
    """
    with _without_autocast(k.device):
        phi_k = _features(k, feature_map, k_map)
        exact = torch.promote_types(phi_k.dtype, torch.float32)
        return phi_k.mT @ v.to(phi_k.dtype), phi_k.sum(-2, dtype=exact).unsqueeze(-1)


def attention_read(q: Tensor, kv: Tensor, total: Tensor, feature_map: str, q_map: Tensor | None) -> Tensor:
    """What each query reads of the tokens in the sums; dividing the features, not the outputs, loses fewer bfloat16 digits.

    Args:
        q: ``[B, heads, M, d]``, not yet scaled.
        kv: S of `attention_sums`, in any dtype.
        total: z of `attention_sums`.
        feature_map: as in `linear_attention`.
        q_map: as there.

    Returns:
        ``[B, heads, M, e]`` in the dtype of the products.
    """
    with _without_autocast(q.device):
        phi_q = _features(q, feature_map, q_map)
        normaliser = (phi_q @ total.to(phi_q.dtype)).clamp(min=_SMALLEST)
        return (phi_q / normaliser) @ kv.to(phi_q.dtype)


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
