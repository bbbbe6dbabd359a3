"""Which patches the student does not see: an exact number per image, token-wise or in blocks.

Source: ViT-Linearizer (arXiv 2504.00037, section 3.3 and table 6b): token-wise masks as in MAE (the default) and block-wise
masks as in BEiT (arXiv 2106.08254, algorithm 1). BEiT stops at *about* the wanted number; here the last block is thinned
at random so that the number is exact and every image of a batch keeps the same length (a choice).
"""

import math
from typing import Literal

import numpy as np

Masking = Literal["token", "block"]

_SMALLEST_BLOCK = 16
_ASPECT = (0.3, 1 / 0.3)


def masked_count(patches: int, ratio: float) -> int:
    """Masked patches of an image: ``ratio`` of them, rounded, but never all and, for a ratio above 0, never none."""
    return 0 if ratio == 0 else min(patches - 1, max(1, round(ratio * patches)))


def sample_mask(grid: tuple[int, int], ratio: float, masking: Masking, rng: np.random.Generator) -> np.ndarray:
    """Draw one image's mask.

    Args:
        grid: patches (down, across).
        ratio: masked share, in [0, 1).
        masking: ``token`` or ``block``.
        rng: source of randomness; the mask depends on nothing else.

    Returns:
        ``[H * W]`` bool in raster order, True where masked, with exactly `masked_count` True.
    """
    patches = grid[0] * grid[1]
    count = masked_count(patches, ratio)
    if masking == "block":
        return _blocks(grid, count, rng).reshape(-1)
    mask = np.zeros(patches, dtype=bool)
    mask[rng.permutation(patches)[:count]] = True
    return mask


def _blocks(grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
    height, width = grid
    mask = np.zeros(grid, dtype=bool)
    while (missing := count - int(mask.sum())) > 0:
        area = rng.uniform(min(_SMALLEST_BLOCK, missing), max(_SMALLEST_BLOCK, missing))
        aspect = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        rows = min(height, max(1, round(math.sqrt(area * aspect))))
        columns = min(width, max(1, round(math.sqrt(area / aspect))))
        top, left = rng.integers(0, height - rows + 1), rng.integers(0, width - columns + 1)
        block = np.zeros_like(mask)
        block[top : top + rows, left : left + columns] = True
        fresh = np.flatnonzero(block & ~mask)
        mask.reshape(-1)[rng.permutation(fresh)[:missing]] = True
    return mask
