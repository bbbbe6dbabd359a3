"""Position embeddings at another grid, for a class token that stands last.

Source: Adventurer (arXiv 2410.07599) appends the class token after the patches, so its position is the last slot.
"""

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor


def resample_position_embedding(embedding: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample the patch positions bicubically (timm's rule) and keep the class slot, which is the last.

    Args:
        embedding: ``[1, H * W + 1, D]``.
        old_grid: the ``(H, W)`` it was made for.
        new_grid: the ``(H', W')`` wanted.

    Returns:
        ``[1, H' * W' + 1, D]``; the argument itself when the grids agree.
    """
    # A symbolic grid (export) is never compared: resampling to the same grid is the identity, and leaves no guard.
    if not _symbolic(new_grid) and old_grid[0] == new_grid[0] and old_grid[1] == new_grid[1]:
        return embedding
    patches = resample_abs_pos_embed(
        embedding[:, :-1], new_size=[new_grid[0], new_grid[1]], old_size=[old_grid[0], old_grid[1]], num_prefix_tokens=0
    )
    return torch.cat([patches, embedding[:, -1:]], dim=1)


def _symbolic(grid: tuple[int, int]) -> bool:
    return False if torch.jit.is_scripting() else any(isinstance(side, torch.SymInt) for side in grid)
