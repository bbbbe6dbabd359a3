"""What a classifier says of labelled pictures: its logits, and how often it is right. Accuracies in percent."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.datasets import nothing_readable, to_device
from ..models.adapters import normalize
from .processes import sum_over_processes

#: The guesses of the second accuracy that is customary; it says nothing of so few classes.
_GUESSES = 5


@torch.no_grad()
def class_scores(model: nn.Module, loader: DataLoader, device: torch.device) -> dict[str, float]:
    """Cross-entropy and accuracies of a model in evaluation mode over a labelled loader, and over all processes' loaders.

    Returns:
        ``loss``, ``top1`` and, where there are more than five classes, ``top5``.

    Raises:
        UserError: not one picture could be read.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    classes = 0
    for batch in loader:
        moved = to_device(batch, device)
        logits = model(normalize(model, moved["images"])).float()
        classes = logits.shape[1]
        sums += count_right(logits, moved["labels"])
    loss, top1, top5, images = sum_over_processes(sums, device).tolist()
    if images == 0:
        raise nothing_readable()
    scores = {"loss": loss / images, "top1": 100 * top1 / images}
    return {**scores, "top5": 100 * top5 / images} if classes > _GUESSES else scores


def count_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over ``[B, classes]`` logits and ``[B]`` labels: cross-entropy, right at once, right in five, pictures."""
    guesses = logits.topk(min(_GUESSES, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.tensor([float(loss), int(guesses[:, 0].sum()), int(guesses.sum()), len(labels)], dtype=torch.float64)
