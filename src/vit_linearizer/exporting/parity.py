"""How far an exported program is from the model in PyTorch: the figure printed after every export."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..contracts import UserError
from .program import Program

#: Largest relative difference that an export may show.
TOLERANCE = 1e-4

Run = Callable[[torch.Tensor], Sequence[np.ndarray]]


def largest_difference(program: Program, run: Run, sizes: Sequence[tuple[int, int, int]]) -> dict[str, float]:
    """Largest absolute difference over the largest absolute value, over all outputs, by size.

    Args:
        program: the truth.
        run: the exported program.
        sizes: (batch, height, width) of the images tried.

    Raises:
        UserError: a difference above `TOLERANCE`, outputs that are not finite, or a program that fails at a size.
    """
    found = {}
    generator = torch.Generator().manual_seed(0)
    for batch, height, width in sizes:
        images = torch.rand(batch, 3, height, width, generator=generator)
        with torch.no_grad():
            wanted = [output.numpy() for output in program(images)]
        name = f"{batch}x{height}x{width}"
        try:
            given = run(images)
        except Exception as error:  # whatever the runtime raises where a model's code has tied the program to one size
            reason = " ".join(str(error).split())[:200]
            raise UserError("export", name, f"the program fails at this size ({reason}); leave out --dynamic") from error
        differences = [_difference(have, want) for have, want in zip(given, wanted, strict=True)]
        found[name] = float(np.max(differences))  # unlike max(), it does not pass over NaN
        if not found[name] <= TOLERANCE:
            remedy = (
                f"at {name} its outputs differ from PyTorch's by {found[name]:.1e}, more than {TOLERANCE:.0e}; not written"
            )
            raise UserError("export", None, remedy)
    return found


def _difference(have: np.ndarray, want: np.ndarray) -> float:
    if have.shape != want.shape or not np.isfinite(have).all():
        return float("inf")
    return float(np.abs(have - want).max() / max(np.abs(want).max(), np.finfo(np.float32).tiny))
