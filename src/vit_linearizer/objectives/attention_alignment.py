"""Attention alignment: each block's linear attention must answer as the softmax attention that it replaces.

Source: ViT-AdaLA (arXiv 2603.16063), stage 1. Both get the *teacher's* input to that block, so blocks learn independently of
each other and no error adds up; the loss is the mean squared error between their outputs. Choices, since the paper is
silent: outputs are taken behind the output projection, and the blocks' errors are averaged without weights (no parameter
belongs to two blocks, so under Adam their scales do not matter).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_alignment(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The loss of stage 1.

    Args:
        student: what the linear attention of each block answers, ``[B, N, D]``.
        teacher: what the softmax attention of that block answers to the same tokens.

    Returns:
        Scalar, in fp32 or better.
    """
    return torch.stack([F.mse_loss(*_exact(pair)) for pair in zip(student, teacher, strict=True)]).mean()


def attention_errors(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """For each block the mean squared error, and the mean square of what is to be answered.

    Args:
        student: as in `attention_alignment`.
        teacher: as there.

    Returns:
        ``[2, blocks]`` in float64.
    """
    pairs = [_exact(pair) for pair in zip(student, teacher, strict=True)]
    both = [(F.mse_loss(own, wanted), wanted.square().mean()) for own, wanted in pairs]
    return torch.stack([torch.stack(values).double() for values in both], dim=1)


def _exact(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    own, wanted = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in pair)
    return own, wanted
