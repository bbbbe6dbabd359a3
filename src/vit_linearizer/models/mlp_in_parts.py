"""A timm ViT's MLP over a long sequence, part by part: on a CPU, in evaluation, without gradients.

An MLP treats every token alike, so parts must equal the whole. What lies between its two linear layers is four times as
wide as the sequence; in parts it stays in the cache, and a linear ViT's time goes on growing with the tokens alone.
"""

import torch
import torch.nn as nn
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor

from .parts import goes_in_parts, segments


class _InParts:
    """Takes the place of a class of timm's in front of it."""

    def forward(self, x: Tensor) -> Tensor:
        if not goes_in_parts(self, x):
            return super().forward(x)  # type: ignore[misc]  # timm's
        out = torch.empty_like(x)
        for start, stop in segments(x.shape[1]):
            out[:, start:stop] = super().forward(x[:, start:stop])  # type: ignore[misc]
        return out


class MlpInParts(_InParts, Mlp):
    """timm's ``Mlp``."""


class GluMlpInParts(_InParts, GluMlp):
    """timm's ``GluMlp``."""


class SwiGLUInParts(_InParts, SwiGLU):
    """timm's ``SwiGLU``."""


_IN_PARTS: dict[type[nn.Module], type[nn.Module]] = {Mlp: MlpInParts, GluMlp: GluMlpInParts, SwiGLU: SwiGLUInParts}


def let_mlp_go_in_parts(mlp: nn.Module) -> None:
    """Turn one of timm's MLPs, with its parameters as they are, into the same one in parts; others stay as they are."""
    mlp.__class__ = _IN_PARTS.get(type(mlp), type(mlp))  # type: ignore[assignment]
