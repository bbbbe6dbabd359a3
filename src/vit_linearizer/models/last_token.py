"""The first linear layer of a mixer of whose outputs only the last token's is read: on a CPU, without gradients.

A gate belongs to its own token alone, while x, B, C and dt reach all later ones; so no other token's gate is computed.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import linear
from ..ops.recording import transformed
from .linear import Linear, prepared
from .watching import all_are_watched, is_watched


def in_proj_for_last(mixer: Any, u: Tensor) -> Callable[[Tensor], Tensor]:
    """``mixer.in_proj`` for tokens ``u`` ``[B, L, D]`` or parts of them, with zeros for gates that nobody reads."""
    in_proj, gates = mixer.in_proj, mixer.inner_dim
    if not _may_be_cut(in_proj, u):
        return in_proj
    without_gates = prepared(in_proj, u.shape[0] * u.shape[1], first=gates)
    weight, bias = in_proj.weight[:gates], None if in_proj.bias is None else in_proj.bias[:gates]

    def run(u: Tensor) -> Tensor:
        zxbcdt = F.pad(without_gates(u), (gates, 0))
        zxbcdt[:, -1:, :gates] = linear(u[:, -1:], weight, bias)
        return zxbcdt

    return run


def _may_be_cut(layer: Any, x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and type(layer) is Linear
        and type(layer.weight) in (Tensor, torch.nn.Parameter)  # of others a part may not be had
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed(x, layer.weight))
        and not (all_are_watched() or is_watched(layer))
    )
