"""The order in which a block of Adventurer reads its tokens, and back.

Source: Adventurer (arXiv 2410.07599). A block sees the mean of all tokens first (heading average), then the patches, in
reverse where it flips, and the class token last in any case. Between blocks tokens stand as [patches, class token].
"""

import torch
from torch import Tensor


def to_reading_order(x: Tensor, flip: bool) -> Tensor:
    """``[B, N + 1, D] -> [B, N + 2, D]``: mean, patches (reversed with ``flip``), class token."""
    mean = x.mean(dim=1, keepdim=True)
    if flip:
        return torch.cat([mean, x[:, :-1].flip(1), x[:, -1:]], dim=1)
    return torch.cat([mean, x], dim=1)


def add_from_reading_order(x: Tensor, mixed: Tensor, flip: bool) -> Tensor:
    """``x`` plus what a block made of `to_reading_order`'s tokens, each in its own place; nothing of the mean's.

    Args:
        x: ``[B, N + 1, D]``: patches, class token.
        mixed: ``[B, N + 2, D]`` in reading order.
        flip: whether the patches of ``mixed`` are reversed.
    """
    if flip:
        return x + torch.cat([mixed[:, 1:-1].flip(1), mixed[:, -1:]], dim=1)
    return x + mixed[:, 1:]
