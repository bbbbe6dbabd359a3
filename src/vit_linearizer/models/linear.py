"""Linear layers by whichever library is best at them."""

from collections.abc import Callable

import torch.nn as nn
from timm.layers import register_notrace_module
from torch import Tensor

from ..ops import linear, onednn, packed_weights
from .parts import SEGMENT


@register_notrace_module
class Linear(nn.Linear):
    """``nn.Linear`` by way of `ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def prepared(layer: nn.Module, rows: int, first: int = 0) -> Callable[[Tensor], Tensor]:
    """A layer for one call of a model, which comes in parts of about `SEGMENT`: its weight is packed once for all of them.

    Args:
        layer: any; others than `Linear` are left alone.
        rows: of all parts together.
        first: of a `Linear`, leave out the outputs before this one.
    """
    if type(layer) is not Linear:
        return layer
    weight: Tensor = layer.weight
    bias: Tensor | None = layer.bias
    if first:
        weight, bias = weight[first:], None if bias is None else bias[first:]
    if rows <= SEGMENT or not onednn.packs(weight, bias):
        return lambda x: linear(x, weight, bias)
    kept = packed_weights.kept(weight, rows)
    packed = onednn.pack(weight, SEGMENT) if kept is weight else kept
    return lambda x: onednn.onednn_linear(x, packed, bias)
