"""A timm ViT's attention module with linear attention in place of softmax, on the same weights.

Source: ViT-AdaLA (arXiv 2603.16063) keeps Q, K, V and output projections and replaces what lies between; the equations stand
in `ops.linear_attention`. Three of timm's modules are known: ``Attention`` (ViT, DeiT-III, CLIP, DINOv2, SigLIP),
``AttentionRope`` and ``EvaAttention`` (EVA, EVA-02, DINOv3: rotary positions, separate projections, grouped queries). All
else that they do is done as they do it: norms of q and k, rotary positions before the feature map, the norm and the gate of
the output.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat, register_notrace_function
from timm.models.eva import EvaAttention
from torch import Tensor

from ..contracts import UserError
from ..ops import linear_attention
from ..ops.linear_attention import LEARNABLE, attention_read, attention_sums, check_feature_map
from .parts import goes_in_parts, segments

#: timm's attention modules that can be made linear; of a subclass nothing is known.
KNOWN = (Attention, AttentionRope, EvaAttention)


@torch.fx.wrap
@register_notrace_function
def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    """A leaf for FX, which puts a stand-in in place of a mask that a model could be given."""
    if attn_mask is not None or is_causal:
        name, value = ("attn_mask", "given") if attn_mask is not None else ("is_causal", True)
        raise UserError(name, value, "linear attention reads all tokens; leave it out, or use the softmax model")


class LinearAttention(nn.Module):
    """Linear attention on the projections and norms of a softmax attention, which it shares with it.

    Parameters bear the names that they had. A learnable feature map adds ``q_map`` and ``k_map``, ``[heads, d, d]``, which
    start as the identity (as in Hedgehog). Dropout of attention weights has no counterpart and is left out.

    Args:
        softmax: a module of one of the `KNOWN` classes.
        feature_map: see `ops.linear_attention.FeatureMap`.

    Raises:
        UserError: unknown feature map.
        TypeError: a module of another class.
    """

    qkv: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    q_bias: Any
    k_bias: Any
    v_bias: Any
    q_norm: Any
    k_norm: Any
    norm: Any
    gate: Any
    proj: Any
    proj_drop: Any
    q_map: Any
    k_map: Any

    def __init__(self, softmax: nn.Module, feature_map: str = "elu"):
        super().__init__()
        check_feature_map(feature_map)
        if type(softmax) not in KNOWN:
            raise TypeError(f"{type(softmax).__name__} is none of {', '.join(known.__name__ for known in KNOWN)}")
        self.feature_map = feature_map
        self.num_heads: int = softmax.num_heads  # type: ignore[assignment]  # all have it
        self.head_dim: int = softmax.head_dim  # type: ignore[assignment]
        self.takes_rope = type(softmax) is not Attention
        self.num_prefix_tokens = getattr(softmax, "num_prefix_tokens", 0)
        self.rotate_half = getattr(softmax, "rotate_half", False)
        self.num_kv_groups = getattr(softmax, "num_kv_groups", 1)
        self.qkv_bias_separate = getattr(softmax, "qkv_bias_separate", False)
        for name in ("qkv", "q_proj", "k_proj", "v_proj", "q_bias", "k_bias", "v_bias"):
            self._take(softmax, name)
        for name in ("q_norm", "k_norm", "norm", "gate", "proj", "proj_drop"):
            self._take(softmax, name)
        if feature_map in LEARNABLE:
            like: Tensor = softmax.proj.weight  # type: ignore[union-attr, assignment]  # all have it
            for name in ("q_map", "k_map"):
                empty = torch.empty(self.num_heads, self.head_dim, self.head_dim, device=like.device, dtype=like.dtype)
                setattr(self, name, nn.Parameter(empty))
        else:
            self.q_map = self.k_map = None
        self._start_maps()
        self.train(softmax.training)

    def _take(self, softmax: nn.Module, name: str) -> None:
        value = getattr(softmax, name, None)
        if name in softmax._buffers:
            self.register_buffer(name, value, persistent=name not in softmax._non_persistent_buffers_set)
        else:
            setattr(self, name, value)

    def _start_maps(self) -> None:
        for weight in (self.q_map, self.k_map):
            if weight is not None:
                with torch.no_grad():
                    weight.copy_(torch.eye(self.head_dim, device=weight.device).expand_as(weight))

    def projections(self) -> list[nn.Parameter]:
        """What makes queries, keys and their features, and values: all that ViT-AdaLA's first stage trains."""
        layers = [layer for layer in (self.qkv, self.q_proj, self.k_proj, self.v_proj) if layer is not None]
        own = [tensor for tensor in (self.q_bias, self.v_bias, self.q_map, self.k_map) if tensor is not None]
        return [parameter for layer in layers for parameter in layer.parameters()] + own

    def reset_parameters(self) -> None:
        """Start what belongs to this module itself, and to none of its layers: timm calls it after ``to_empty``."""
        self._start_maps()
        for bias in (self.q_bias, self.v_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Fill what no weight file holds; timm's name for it."""
        if self.k_bias is not None:
            self.k_bias.zero_()

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """``[B, N, D] -> [B, N, D]``, with the arguments of timm's modules by their names.

        Args:
            x: tokens, after the norm before.
            rope: rotary positions of the tokens behind the prefix, as the model gives them; EVA's modules only.
            attn_mask: not supported.
            is_causal: not supported.

        Raises:
            UserError: a mask, or rotary positions for a module that had none.
        """
        _refuse_masks(attn_mask, is_causal)
        if rope is not None and not self.takes_rope:
            raise UserError("rope", "given", "this attention has no rotary positions; leave it out")
        if type(self.qkv) not in (type(None), nn.Linear) or not goes_in_parts(self, x):
            q, k, v = self._project(x, rope, "qkv")
            return self._behind(x, linear_attention(q, k, v, self.feature_map, self.q_map, self.k_map))
        kv: Any = 0.0
        total: Any = 0.0
        for start, stop in segments(x.shape[1]):
            k, v = self._project(x[:, start:stop], rope, "kv", start)
            kv_part, total_part = attention_sums(k, v, self.feature_map, self.k_map)
            kv, total = kv + kv_part.to(total_part.dtype), total + total_part
        out = torch.empty_like(x)
        for start, stop in segments(x.shape[1]):
            (q,) = self._project(x[:, start:stop], rope, "q", start)
            read = attention_read(q, kv, total, self.feature_map, self.q_map).to(x.dtype)
            out[:, start:stop] = self._behind(x[:, start:stop], read)
        return out

    def _behind(self, x: Tensor, y: Tensor) -> Tensor:
        """From what the heads ``[B, heads, N, d]`` read for the tokens ``x`` to the output."""
        y = self.norm(y.transpose(1, 2).flatten(2))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))

    def _project(self, x: Tensor, rope: Tensor | None, names: str, start: int = 0) -> list[Tensor]:
        """Queries (q), keys (k) and values (v) as named, ``[B, heads, N, d]`` each, of the tokens from ``start`` on."""
        plain, found = self._project_plainly(x, names), []
        for number, name in enumerate(names):  # a graph of FX can be asked for its parts, but not how many there are
            heads = plain[number]
            dtype = heads.dtype
            if name != "v":
                heads = self.q_norm(heads) if name == "q" else self.k_norm(heads)
                heads = heads if rope is None else self._rotate(heads, rope, start).to(dtype)
            if name != "q" and self.num_kv_groups > 1:
                heads = heads.repeat_interleave(self.num_kv_groups, dim=1)
            found.append(heads)
        return found

    def _project_plainly(self, x: Tensor, names: str) -> Sequence[Tensor]:
        """The same before norms and rotation, keys and values of a group of heads once."""
        if self.qkv is None:
            layers = {"q": self.q_proj, "k": self.k_proj, "v": self.v_proj}
            return [layers[name](x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for name in names]
        bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        if names != "qkv":  # in parts, so the layer is a plain one
            width = self.num_heads * self.head_dim
            rows = slice("qkv".index(names[0]) * width, ("qkv".index(names[-1]) + 1) * width)
            bias = self.qkv.bias if bias is None else bias
            projected = F.linear(x, self.qkv.weight[rows], None if bias is None else bias[rows])
        elif bias is None:
            projected = self.qkv(x)
        else:  # two roundings or one, as the weights were trained
            projected = self.qkv(x) + bias if self.qkv_bias_separate else F.linear(x, self.qkv.weight, bias)
        return projected.unflatten(-1, (len(names), self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

    def _rotate(self, x: Tensor, rope: Tensor, start: int) -> Tensor:
        """Turn all but the prefix; the first token of ``x`` is number ``start`` of the sequence."""
        before = max(0, self.num_prefix_tokens - start)
        first = max(0, start - self.num_prefix_tokens)
        prefix, patches = x[:, :, :before], x[:, :, before:]
        positions = (
            rope if first == 0 and rope.shape[-2] == patches.shape[2] else rope[..., first : first + patches.shape[2], :]
        )
        return torch.cat([prefix, apply_rot_embed_cat(patches, positions, half=self.rotate_half)], dim=2)

    def extra_repr(self) -> str:
        return f"feature_map={self.feature_map}"
