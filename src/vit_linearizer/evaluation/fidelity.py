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
    images and the cosine to the (centred) teacher tokens is taken on the second half. It needs no trained projection, so
    students of any objective, and untrained ones, are measured alike. With fewer tokens to fit on than the student is wide
    it reads too low.

    Args:
        student: ``[images, tokens, D_s]``; of a single image, the tokens are halved instead.
        teacher: ``[images, tokens, D_t]``, the same tokens.
        ridge: relative to the mean squared student feature.

    Returns:
        Mean cosine in [-1, 1].
    """
    images, tokens = student.shape[:2]
    half = max(1, images // 2 * tokens if images > 1 else tokens // 2)
    x, y = student.flatten(0, 1).double(), teacher.flatten(0, 1).double()
    x, y = x - x[:half].mean(0), y - y[:half].mean(0)
    gram = x[:half].T @ x[:half]
    strength = ridge * gram.diagonal().mean().clamp_min(1e-12)
    weights = torch.linalg.solve(gram + strength * torch.eye(len(gram), dtype=gram.dtype), x[:half].T @ y[:half])
    return float(F.cosine_similarity(x[half:] @ weights, y[half:], dim=1).mean())
