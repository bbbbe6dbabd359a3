"""``torch.export``: one ``.pt2`` file, loaded and replayed before it gets its name."""

import tempfile
from pathlib import Path

import torch
from torch.export import ExportedProgram

from .parity import largest_difference
from .program import Program


def write_torch_program(
    program: Program, exported: ExportedProgram, path: Path, *, sizes: list[tuple[int, int, int]]
) -> dict[str, float]:
    """Save, load, replay and compare.

    Args:
        program: the model to compare with.
        exported: its capture.
        path: the ``.pt2`` file.
        sizes: image sizes to compare at.

    Returns:
        Differences by size.

    Raises:
        UserError: the difference is too large.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.name) as folder:
        fresh = Path(folder) / path.name
        torch.export.save(exported, fresh)
        replayed = torch.export.load(fresh).module()
        with torch.no_grad():
            differences = largest_difference(program, lambda images: [t.numpy() for t in replayed(images)], sizes)
        fresh.replace(path)
    return differences
