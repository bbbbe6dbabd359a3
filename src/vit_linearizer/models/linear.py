"""Linear layers by whichever library is best at them."""

from collections.abc import Callable

import torch.nn as nn
from timm.layers import register_notrace_module
from torch import Tensor

from ..ops import linear, onednn


@register_notrace_module
class Linear(nn.Linear):
    """``nn.Linear`` by way of `ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def prepared(layer: nn.Module, rows: int) -> Callable[[Tensor], Tensor]:
    """A layer for several calls with so many rows each: its weight is packed once for them, and for them alone."""
    if type(layer) is not Linear or not onednn.packs(layer.weight, layer.bias):
        return layer
    packed = onednn.pack(layer.weight, rows)
    return lambda x: onednn.onednn_linear(x, packed, layer.bias)
