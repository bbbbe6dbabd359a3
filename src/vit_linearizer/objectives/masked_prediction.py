"""Masked prediction: where the student saw only a mask token, it must predict what the teacher saw.

Source: ViT-Linearizer (arXiv 2504.00037, section 3.3, eq. 6): Smooth-L1 between the teacher's output and the linearly
projected student output, averaged over the masked positions only. Choices, since the paper is silent: the mean runs over
channels too, beta is 1, and the target is the teacher's last block after a LayerNorm without weights (as in MaskDistill,
whose recipe the paper follows).
"""

from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..contracts import Features

Target = Literal["layer_norm", "none"]


def teacher_target(teacher: Features, target: Target) -> Tensor:
    """The teacher's last block, ``[B, N, D]`` in fp32 or better, normalised per token or as it is."""
    tokens = teacher.stages[-1].tokens
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return F.layer_norm(tokens, tokens.shape[-1:]) if target == "layer_norm" else tokens


class MaskedPrediction(nn.Module):
    """The loss of eq. 6 with its projection from student to teacher width.

    Args:
        student_dim: width of the student.
        teacher_dim: width of the teacher.
        target: what of the teacher is predicted, see `teacher_target`.
    """

    def __init__(self, student_dim: int, teacher_dim: int, *, target: Target = "layer_norm"):
        super().__init__()
        self.target: Target = target
        self.projection = nn.Linear(student_dim, teacher_dim)

    def pairs(self, student: Features, teacher: Features, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction and target at the masked positions, each ``[masked, teacher_dim]``."""
        return self.projection(student.tokens[mask]), teacher_target(teacher, self.target)[mask]

    def forward(self, student: Features, teacher: Features, mask: Tensor | None) -> Tensor:
        """Scalar loss; ``mask`` is ``[B, N]`` bool, True where masked, and must not be None."""
        if mask is None:
            raise ValueError("masked prediction needs a mask")
        prediction, target = self.pairs(student, teacher, mask)
        return F.smooth_l1_loss(prediction.to(target.dtype), target)
