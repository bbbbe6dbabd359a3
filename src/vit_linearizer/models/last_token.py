"""The first linear layer of a mixer of whose outputs only the last token's is read: on a CPU, without gradients.

A gate belongs to its own token alone, while x, B, C and dt reach all later ones; so no other token's gate is computed.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import linear
from .linear import Linear, prepared


def in_proj_for_last(mixer: Any, u: Tensor) -> Callable[[Tensor], Tensor]:
    """``mixer.in_proj`` for tokens ``u`` ``[B, L, D]`` or parts of them, with zeros for gates that nobody reads."""
    in_proj, gates = mixer.in_proj, mixer.inner_dim
    pays = u.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if type(in_proj) is not Linear or not pays:
        return in_proj
    without_gates = prepared(in_proj, u.shape[0] * u.shape[1], first=gates)
    gate = in_proj.weight[:gates]

    def run(u: Tensor) -> Tensor:
        zxbcdt = F.pad(without_gates(u), (gates, 0))
        zxbcdt[:, -1:, :gates] = linear(u[:, -1:], gate, None)
        return zxbcdt

    return run
