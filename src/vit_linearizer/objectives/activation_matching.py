"""Activation matching: student and teacher must agree on which tokens resemble which.

Source: ViT-Linearizer (arXiv 2504.00037, section 3.2, eqs. 4-5). At each of K stages,

    A(i, j) = <f_i, f_j> / (|f_i| |f_j|)                                          (eq. 4)
    L_act   = mean over stages and rows of |A_teacher(i, :) - A_student(i, :)|^2      (eq. 5, rows of unit L2 norm)

The widths of the two models need not agree. The row norm is unreadable in the source at hand; L2 is a choice, named so.
Only tokens the student sees enter the maps (section 3.3): over masked ones the teacher's map would give the answer away.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contracts import Features, UserError

MatchedTokens = Literal["visible", "all", "class"]


def activation_map(tokens: Tensor, queries: Tensor | None = None) -> Tensor:
    """Cosine similarities with rows of unit L2 norm (eq. 4 and the normalisation before eq. 5), in fp32 or better.

    Args:
        tokens: ``[B, N, D]``, the columns.
        queries: ``[B, M, D]``, the rows; the tokens themselves by default.

    Returns:
        ``[B, M, N]``.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        exact = torch.promote_types(tokens.dtype, torch.float32)
        columns = F.normalize(tokens.to(exact), dim=-1)
        rows = columns if queries is None else F.normalize(queries.to(exact), dim=-1)
        return F.normalize(rows @ columns.transpose(1, 2), dim=-1)


def activation_matching(
    student: Features, teacher: Features, mask: Tensor | None, *, tokens: MatchedTokens = "visible"
) -> Tensor:
    """The loss of eq. 5.

    Args:
        student: features with K stages.
        teacher: features with K stages on the same grid.
        mask: ``[B, N]`` bool, True where the student saw the mask token; None for none.
        tokens: ``visible`` tokens (default), ``all`` tokens, or only the ``class`` token's row against the visible patches
            (the ablation of table 6c).

    Returns:
        Scalar.

    Raises:
        UserError: ``class`` for a model without class token.
    """
    losses = []
    for student_stage, teacher_stage in zip(student.stages, teacher.stages, strict=True):
        maps = [_stage_map(stage, mask, tokens) for stage in (student_stage, teacher_stage)]
        losses.append((maps[0] - maps[1]).square().sum(-1).mean())
    return torch.stack(losses).mean()


def _stage_map(stage: Features, mask: Tensor | None, tokens: MatchedTokens) -> Tensor:
    patches = stage.tokens
    if mask is not None and tokens != "all":
        # Every image hides the same number of patches, so what is left is rectangular.
        patches = patches[~mask].view(patches.shape[0], -1, patches.shape[-1])
    if tokens != "class":
        return activation_map(patches)
    if stage.class_token is None:
        raise UserError("--activation-matching-tokens", "class", "needs models with a class token; use visible or all")
    return activation_map(patches, stage.class_token[:, None])
