"""How close a student is to its teacher, without labels: maps stage by stage, and what its final tokens say of the other's.

Sources: the activation maps of ViT-Linearizer (arXiv 2504.00037, eq. 4); linear CKA (arXiv 1905.00414, section 3).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contracts import Features
from ..objectives import activation_map

#: Tokens that enter the comparison of final tokens, over all images; at least so many of each image that takes part.
_TOKENS, _LEAST_TOKENS = 8192, 16


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

    The two models have different axes and widths, so a linear map is fitted by ridge regression on every other image and
    the cosine to the (centred) teacher tokens is taken on the rest: files often lie sorted by what they show. It needs no
    trained projection, so students of any objective, and untrained ones, are measured alike. With fewer tokens to fit on
    than the student is wide it reads too low.

    Args:
        student: ``[images, tokens, D_s]``; of a single image, every other token.
        teacher: ``[images, tokens, D_t]``, the same tokens.
        ridge: relative to the mean squared student feature.

    Returns:
        Mean cosine in [-1, 1].
    """
    if len(student) == 1:
        student, teacher = student.transpose(0, 1), teacher.transpose(0, 1)
    x, y, x_other, y_other = (tokens[start::2].flatten(0, 1).double() for start in (0, 1) for tokens in (student, teacher))
    x_mean, y_mean = x.mean(0), y.mean(0)
    x = x - x_mean
    gram = x.T @ x
    strength = ridge * gram.diagonal().mean().clamp_min(1e-12)
    weights = torch.linalg.solve(gram + strength * torch.eye(len(gram), dtype=gram.dtype), x.T @ (y - y_mean))
    return float(F.cosine_similarity((x_other - x_mean) @ weights, y_other - y_mean, dim=1).mean())


def linear_cka(student: Tensor, teacher: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features of the same things.

    Args:
        student: ``[N, D_s]``.
        teacher: ``[N, D_t]``.

    Returns:
        In [0, 1]; 1 where one is a rotation, shift and scaling of the other. 0 where either does not vary.
    """
    x, y = (features.double() - features.double().mean(0) for features in (student, teacher))
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return float((y.T @ x).square().sum() / scale) if scale > 0 else 0.0


class FidelityMeter:
    """Collects batches of `Features` of both models, over whole images.

    Args:
        images: how many there will be: of so many the tokens are kept, and so many of each, that all together stay few.
    """

    def __init__(self, images: int):
        self._kept = max(_LEAST_TOKENS, _TOKENS // max(1, images))
        self._every = max(1, math.ceil(images * _LEAST_TOKENS / _TOKENS))
        self._seen = 0
        self._agreements: list[Tensor] = []
        self._student: list[Tensor] = []
        self._teacher: list[Tensor] = []

    def update(self, student: Features, teacher: Features) -> None:
        """Add a batch; both have the same stages and grid."""
        size = len(student.tokens)
        self._agreements.append(size * activation_agreement(student, teacher).double().cpu())
        chosen = torch.randperm(student.tokens.shape[1], generator=torch.Generator().manual_seed(0))[: self._kept]
        first = -self._seen % self._every
        self._seen += size
        for kept, features in ((self._student, student), (self._teacher, teacher)):
            kept.append(features.tokens[first :: self._every, chosen].float().cpu())

    def scores(self) -> dict[str, float]:
        """``agreement_stage1..K`` (`activation_agreement`), ``final_cosine`` (`readout_cosine`), ``cka`` (`linear_cka`)."""
        student, teacher = torch.cat(self._student), torch.cat(self._teacher)
        agreements = torch.stack(self._agreements).sum(0) / self._seen
        scores = {f"agreement_stage{number}": float(value) for number, value in enumerate(agreements, start=1)}
        if student.shape[0] * student.shape[1] > 1:
            scores["final_cosine"] = readout_cosine(student, teacher)
            scores["cka"] = linear_cka(student.flatten(0, 1), teacher.flatten(0, 1))
        return scores
