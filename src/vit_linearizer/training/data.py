"""From a source of pictures to what the loop draws from: training views, held-out views, and a labelled bank."""

from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ..data.datasets import CentreSet, SkippedList, TrainingSet, centre_loader
from ..data.sources import ImageSource
from ..data.views import MaskConfig, TrainingView, ViewConfig

#: Labelled training pictures that held-out ones are compared with (kNN during training), and the evaluation batch.
_BANK, _EVALUATION_BATCH = 512, 64


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What the loop draws from.

    Attributes:
        training: views to learn from.
        repeats: of repeated augmentation.
        held_out: centre views for evaluation, under fixed masks.
        bank: labelled centre views of training pictures, or None where there are no labels.
        colours_in_loader: whether the loader computes colours that `ViewConfig.device_augmentation` would spare it.
    """

    training: Dataset
    repeats: int
    held_out: DataLoader
    bank: DataLoader | None
    colours_in_loader: bool = False


def prepare_data(
    source: ImageSource,
    train_numbers: np.ndarray,
    held_out_numbers: np.ndarray,
    *,
    image_size: tuple[int, int],
    views: ViewConfig,
    mask: MaskConfig | None,
    seed: int,
    batch_size: int,
    num_workers: int,
    skipped: SkippedList,
) -> TrainingData:
    """Put a source's pictures into the views of a run.

    Args:
        source: of the pictures.
        train_numbers: which to train on.
        held_out_numbers: which to evaluate on.
        image_size: (height, width) of every view.
        views: augmentation of the training views.
        mask: which patches are hidden; None for none.
        seed: of the run.
        batch_size: of one forward pass; evaluations use no larger one.
        num_workers: processes that load images for evaluations.
        skipped: where unreadable files are listed.
    """

    def centre(numbers: np.ndarray, mask: MaskConfig | None) -> DataLoader:
        pictures = CentreSet(source, numbers, image_size, mask=mask, skipped=skipped)
        return centre_loader(pictures, batch_size=min(_EVALUATION_BATCH, batch_size), num_workers=num_workers)

    return TrainingData(
        training=TrainingSet(source, train_numbers, TrainingView(image_size, views, mask, seed=seed), skipped),
        repeats=views.repeats,
        held_out=centre(held_out_numbers, mask),
        bank=centre(train_numbers[:_BANK], None) if source.labels is not None else None,
        colours_in_loader=views.colours_in_loader,
    )
