"""Linear layers, and how long sequences pass through several of them part by part."""

import itertools
from collections.abc import Callable

import torch
import torch.fx
import torch.nn as nn
from timm.layers import register_notrace_module
from torch import Tensor

from ..ops import linear, onednn

#: Tokens that go through at a time: what lies between two layers stays in the cache, and weights are read seldom enough.
SEGMENT = 1024


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


def worth_cutting(x: Tensor) -> bool:
    """Whether ``[B, L, D]`` is long and nothing of the way through is kept: on a CPU, without gradients, in eager mode."""
    return (
        not isinstance(x, torch.fx.Proxy)
        and x.shape[1] > SEGMENT * 3 // 2
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def segments(length: int) -> list[tuple[int, int]]:
    """Start and stop of parts of nearly equal length, about `SEGMENT` each."""
    count = max(1, round(length / SEGMENT))
    bounds = [length * k // count for k in range(count + 1)]
    return list(itertools.pairwise(bounds))
