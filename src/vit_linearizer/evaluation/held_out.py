"""What a distillation says of its student on held-out images: means of the losses, fidelity, nearest neighbours."""

from collections.abc import Mapping

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.data import DataLoader

from ..contracts import Features
from ..data.datasets import nothing_readable
from .features import collect_features
from .fidelity import FidelityMeter
from .knn import knn_accuracy


class StudentMeter:
    """Collects batches of held-out images.

    Args:
        images: how many there will be.
    """

    def __init__(self, images: int):
        self._fidelity = FidelityMeter(images)
        self._sums: dict[str, float] = {}
        self._seen = 0
        self._pooled: list[Tensor] = []
        self._labels: list[Tensor] = []

    def update(self, losses: Mapping[str, Tensor], student: Features, teacher: Features, labels: Tensor | None) -> None:
        """Add a batch.

        Args:
            losses: means over the batch, by name.
            student: of the whole images, nothing masked.
            teacher: likewise.
            labels: ``[B]``, where there are any.
        """
        size = len(student.tokens)
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + size * float(value)
        self._seen += size
        self._fidelity.update(student, teacher)
        self._pooled.append(student.pooled.float().cpu())
        if labels is not None:
            self._labels.append(labels.cpu())

    def scores(self, student: nn.Module, bank: DataLoader | None, device: torch.device) -> dict[str, float]:
        """Each loss, what `FidelityMeter` says, and ``knn`` in percent when ``bank`` (labelled images) is given.

        Raises:
            UserError: not one picture could be read.
        """
        if not self._pooled:
            raise nothing_readable()
        scores = {**{name: total / self._seen for name, total in self._sums.items()}, **self._fidelity.scores()}
        if bank is not None:
            features, labels = collect_features(student, bank, device)
            scores["knn"] = knn_accuracy(features, labels, torch.cat(self._pooled), torch.cat(self._labels))
        return scores
