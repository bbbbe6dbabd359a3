"""Plain regression of the teacher's final patch tokens: the baseline that must stand in every comparison.

Source: GTR (arXiv 2609.26590), whose re-test finds squared L2 on the final patch tokens ahead of both papers followed here.
Choices, since details are not given: a linear projection, the mean over all tokens and channels, and the same normalised
target as masked prediction, so that the two can be compared and combined.
"""

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..contracts import Features
from .masked_prediction import Target, teacher_target


class FeatureRegression(nn.Module):
    """Mean squared error between projected student tokens and the teacher's, at every position.

    Args:
        student_dim: width of the student.
        teacher_dim: width of the teacher.
        target: what of the teacher is regressed, see `teacher_target`.
    """

    def __init__(self, student_dim: int, teacher_dim: int, *, target: Target = "layer_norm"):
        super().__init__()
        self.target: Target = target
        self.projection = nn.Linear(student_dim, teacher_dim)

    def forward(self, student: Features, teacher: Features, mask: Tensor | None = None) -> Tensor:
        """Scalar loss; the mask is not used."""
        target = teacher_target(teacher, self.target)
        return F.mse_loss(self.projection(student.tokens).to(target.dtype), target)
