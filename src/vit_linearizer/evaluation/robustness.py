"""Accuracy on corrupted pictures: how much of it is left when the pictures are no longer those trained on.

Source: ImageNet-C's kinds and severities (arXiv 1903.12261), see `corruptions`; that paper relates a model's errors to those
of a reference model, and here the reference is the teacher.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.datasets import to_device
from .corruptions import KINDS, SEVERITIES, corrupt

#: Images ``[B, 3, H, W]`` in [0, 1] -> class numbers ``[B]`` on the CPU.
Reader = Callable[[Tensor], Tensor]


@torch.no_grad()
def corrupted_accuracies(
    readers: Mapping[str, Reader],
    loader: DataLoader,
    device: torch.device,
    *,
    kinds: Sequence[str] = KINDS,
    done: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, list[float]]]:
    """Accuracy of each model on each kind of corruption, all on the same corrupted pictures.

    Args:
        readers: by the model's name.
        loader: batches of ``images``, ``labels`` and ``numbers``.
        device: where the models are.
        kinds: of corruption.
        done: called after each batch, for progress.

    Returns:
        By name and kind, percent at each of the five severities.
    """
    right = {name: torch.zeros(len(kinds), len(SEVERITIES), dtype=torch.float64) for name in readers}
    images = 0
    for batch in loader:
        pictures = to_device(batch, torch.device("cpu"))["images"]
        for k, kind in enumerate(kinds):
            for s, severity in enumerate(SEVERITIES):
                spoilt = corrupt(pictures, kind, severity, batch["numbers"].tolist()).to(device)
                for name, read in readers.items():
                    right[name][k, s] += int((read(spoilt) == batch["labels"]).sum())
        images += len(pictures)
        done()
    return {
        name: {kind: (100 * row / images).tolist() for kind, row in zip(kinds, counts, strict=True)}
        for name, counts in right.items()
    }


def summarise_corruptions(clean: float, table: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean over kinds and severities, and what is lost against clean pictures.

    Args:
        clean: accuracy on the pictures as they are, in percent.
        table: accuracy by kind, of one model (`corrupted_accuracies`).

    Returns:
        ``corruption_top1`` in percent; ``corruption_drop``, clean minus that, in points; ``corruption_relative_drop``, that
        drop as a percentage of the clean accuracy (0 where there is none to lose).
    """
    values = [value for row in table.values() for value in row]
    mean = sum(values) / len(values)
    drop = clean - mean
    return {
        "corruption_top1": mean,
        "corruption_drop": drop,
        "corruption_relative_drop": 100 * drop / clean if clean > 0 else 0.0,
    }
