"""Long sequences in parts: on a CPU, in evaluation, without gradients, where nobody looks at what lies between.

What a layer makes of a part stays in the cache until the next layer reads it, and memory is not asked for anew each time.
"""

import itertools
from typing import Any

import torch
import torch.fx
from torch import Tensor

from ..ops.recording import transformed
from .watching import all_are_watched, is_watched

#: Tokens of a part: few enough for the cache, many enough that reading all weights for them is nothing.
SEGMENT = 1024


def segments(length: int) -> list[tuple[int, int]]:
    """Start and stop of parts of nearly equal length, about `SEGMENT` each."""
    count = max(1, round(length / SEGMENT))
    bounds = [length * k // count for k in range(count + 1)]
    return list(itertools.pairwise(bounds))


def goes_in_parts(module: Any, x: Tensor) -> bool:
    """Whether a module may take ``[B, L, D]`` in parts, and it pays. Somebody who hooks into a child of it wants one go."""
    return (
        not isinstance(x, torch.fx.Proxy)
        and x.device.type == "cpu"
        and not (torch.is_grad_enabled() or module.training)
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed(x))
        and x.dim() == 3
        and x.shape[1] > SEGMENT * 3 // 2
        and not (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16)
        and not all_are_watched()
        and not any(is_watched(child) for child in module.children())
    )
