"""Feature alignment: the student's final features must be the teacher's.

Source: ViT-AdaLA (arXiv 2603.16063), stage 2: the mean squared error between final features removes what the errors of
single blocks add up to. Student and teacher are one architecture, so nothing is projected: what reads the teacher's features
can read the student's. Choices, since the paper is silent: features after the final norm, of all patches and of the class
token, each token with equal weight. Other prefix tokens (registers, a distillation token) are free.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contracts import Features


def feature_alignment(student: Features, teacher: Features) -> Tensor:
    """The loss of stage 2.

    Args:
        student: features of the width and on the grid of the teacher's.
        teacher: what they should be. Class tokens count where both have one.

    Returns:
        Scalar, in fp32 or better.
    """
    with_class_token = student.class_token is not None and teacher.class_token is not None
    own, wanted = (_all_tokens(features, with_class_token) for features in (student, teacher))
    return F.mse_loss(own, wanted)


def _all_tokens(features: Features, with_class_token: bool) -> Tensor:
    tokens = features.tokens
    if with_class_token and features.class_token is not None:
        tokens = torch.cat([features.class_token[:, None], tokens], dim=1)
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))
