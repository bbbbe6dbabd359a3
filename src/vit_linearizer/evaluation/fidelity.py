"""How close a student is to its teacher, without labels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contracts import Features
from ..objectives import activation_map


def activation_agreement(student: Features, teacher: Features) -> Tensor:
    """Cosine between the rows of the two activation maps (eq. 4), mean over all tokens: ``[K]``, one per stage, 1 is equal.

    With unit rows this is ``1 - L_act / 2`` over all tokens.
    """
    agreements = []
    for student_stage, teacher_stage in zip(student.stages, teacher.stages, strict=True):
        product = activation_map(student_stage.tokens) * activation_map(teacher_stage.tokens)
        agreements.append(product.sum(-1).mean())
    return torch.stack(agreements)


def readout_cosine(student: Tensor, teacher: Tensor, *, ridge: float = 1e-3) -> float:
    """How well the teacher's tokens can be read linearly from the student's: cosine on tokens not used for the fit.

    The two models have different axes and widths, so a linear map is fitted by ridge regression on the first half of the
    rows and the cosine to the (centred) teacher tokens is taken on the second half. It needs no trained projection, so
    students of any objective, and untrained ones, are measured alike. Rows in image order keep the halves' images apart.

    Args:
        student: ``[M, D_s]``.
        teacher: ``[M, D_t]``, the same tokens.
        ridge: relative to the mean squared student feature.

    Returns:
        Mean cosine in [-1, 1].
    """
    half = len(student) // 2
    x, y = student.double(), teacher.double()
    x, y = x - x[:half].mean(0), y - y[:half].mean(0)
    gram = x[:half].T @ x[:half]
    strength = ridge * gram.diagonal().mean().clamp_min(1e-12)
    weights = torch.linalg.solve(gram + strength * torch.eye(len(gram), dtype=gram.dtype), x[:half].T @ y[:half])
    return float(F.cosine_similarity(x[half:] @ weights, y[half:], dim=1).mean())
