"""Pictures with masks as batches: the training set by draws, and the evaluation set, each picture once.

While training, what cannot be read is replaced by the next readable picture and listed, as in `datasets`. An evaluation
replaces nothing: a score counts every picture once, or says that it could not be read.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..datasets import SkippedList, leave_signals_to_parent, read_or_next
from ..images import UnreadableImageError
from ..sampler import Draw
from .sets import SegmentationSource
from .views import SegmentationView, evaluation_view


class SegmentationTrainingSet(Dataset[dict[str, Tensor]]):
    """Views by `Draw`: ``images`` uint8 ``[3, h, w]`` and ``masks`` uint8 ``[h, w]``; batches stack them.

    Args:
        source: pictures and masks.
        view: what is shown of them.
        skipped: where unreadable ones are listed.
    """

    def __init__(self, source: SegmentationSource, view: SegmentationView, skipped: SkippedList):
        self.source, self.view, self.skipped = source, view, skipped
        self.numbers = np.arange(len(source))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, draw: Draw) -> dict[str, Tensor]:  # type: ignore[override]  # the sampler gives draws
        pair, _ = read_or_next(self.source, self.numbers, draw.place, self.skipped)
        image, mask = pair
        return self.view(image, mask, draw)


class SegmentationEvaluationSet(Dataset[dict[str, Any]]):
    """Whole pictures by number.

    Each item is ``image`` uint8 ``[3, h, w]``, ``mask`` uint8 ``[H, W]`` of the picture's own size, and ``number``; or
    ``number`` and ``problem``, the reason in one line, for what cannot be read.

    Args:
        source: pictures and masks.
        crop: (height, width) that the model was trained on, in pixels.
        skipped: where unreadable ones are listed.
    """

    def __init__(self, source: SegmentationSource, crop: tuple[int, int], skipped: SkippedList):
        self.source, self.crop, self.skipped = source, crop, skipped

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            image, mask = self.source.read(number)
        except UnreadableImageError as problem:
            self.skipped.add(self.source.name(number), str(problem))
            return {"number": number, "problem": str(problem)}
        view = evaluation_view(image, self.crop, self.source.resize)
        return {"image": view, "mask": torch.from_numpy(mask), "number": number}


def evaluation_loader(dataset: Dataset[dict[str, Any]], *, batch_size: int, num_workers: int) -> DataLoader:
    """All pictures once, in order, as lists of items: their sizes differ.

    Args:
        dataset: a `SegmentationEvaluationSet`, or a part of one.
        batch_size: items in a list; the last one may be shorter.
        num_workers: processes that read; 0 reads in this one.

    Returns:
        A loader of lists of the set's items.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_as_list,
        worker_init_fn=leave_signals_to_parent,
    )


def _as_list(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return items
