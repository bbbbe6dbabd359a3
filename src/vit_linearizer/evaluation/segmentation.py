"""How well a segmenter labels pixels: a confusion matrix of exact counts, and prediction whole or by sliding windows.

Mean intersection over union as of Pascal VOC (Everingham et al. 2010, section 4.3): one matrix over all pixels of all
pictures, ``IoU = true positives / (true positives + false positives + false negatives)`` of each class, then the mean.
Counts are integers, so how pictures were batched, or spread over processes, does not enter. Scores in percent.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks

from ..contracts import UserError
from ..data.segmentation import IGNORED
from ..models.segmenter import Segmenter

Mode = Literal["whole", "sliding"]

#: Classes whose logits are brought to a mask's size at a time: 150 at once take gigabytes for a large photograph.
_CLASSES_AT_A_TIME = 16
#: Logits of pictures that are run together: a gigabyte.
_MOST_LOGITS = 2**28


class ConfusionMatrix:
    """Pixels counted by true and predicted class.

    Args:
        classes: number of classes C.
        device: where the counts are kept.

    Attributes:
        counts: ``[C, C]`` int64, rows the truth, columns the prediction.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu"):
        self.classes = classes
        self.counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Count pixels.

        Args:
            predicted: integers of any shape, 0 to C - 1.
            target: the same shape, 0 to C - 1, or 255 for pixels to leave out.

        Raises:
            ValueError: shapes differ, or the target holds a value that is neither a class nor 255.
        """
        if predicted.shape != target.shape:
            raise ValueError(f"prediction {tuple(predicted.shape)} and target {tuple(target.shape)} must have one shape")
        kept = target != IGNORED
        cells = target[kept].long() * self.classes + predicted[kept].long()
        counted = torch.bincount(cells, minlength=self.classes**2)
        if len(counted) > self.classes**2:
            raise ValueError(f"class {(len(counted) - 1) // self.classes} of {self.classes}: use 0 to C - 1, or {IGNORED}")
        self.counts += counted.view(self.classes, self.classes).to(self.counts.device)

    def merge(self, other: "ConfusionMatrix") -> None:
        """Add the counts of another matrix of the same classes."""
        self.counts += other.counts.to(self.counts.device)

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Replace the counts by their sum over processes.

        Args:
            total: a tensor -> its sum over all processes, as accelerate's ``Accelerator.reduce``.
        """
        self.counts = total(self.counts)

    def scores(self) -> dict[str, Any]:
        """The figures, in percent.

        Returns:
            ``miou``: mean over the classes that occur in the truth or in a prediction; a class absent from both has no
            IoU and is left out. ``pixel_accuracy``: share of pixels labelled right. ``mean_accuracy``: share of each
            class's own pixels labelled right, the mean over the classes that occur in the truth. ``iou``: of each class,
            None where it has none.

        Raises:
            UserError: no pixel was counted.
        """
        counts = self.counts.cpu().double()
        if counts.sum() == 0:
            raise UserError("--data", None, "no labelled pixel to score; look at the list of skipped files")
        right, truth, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        union = truth + predicted - right
        iou, recall = 100 * right / union, 100 * right / truth  # 0 / 0 is the nan of a class that does not occur
        return {
            "miou": float(iou[union > 0].mean()),
            "pixel_accuracy": float(100 * right.sum() / counts.sum()),
            "mean_accuracy": float(recall[truth > 0].mean()),
            "iou": [None if math.isnan(value) else value for value in iou.tolist()],
        }


def window_starts(size: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along one side: every ``stride``, the last one flush with the border; one if ``crop`` covers it.

    Args:
        size: pixels of the side.
        crop: pixels of a window.
        stride: pixels from one window to the next.
    """
    if size <= crop:
        return [0]
    return [*range(0, size - crop, stride), size - crop]


def predict_logits(
    segmenter: nn.Module,
    images: Tensor,
    *,
    crop: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    mode: Mode = "whole",
) -> Tensor:
    """Scores at every pixel, of the whole image at once or averaged over windows.

    Windows of ``crop`` lie every ``stride``, the last one of a row or column flush with the border; logits, not
    probabilities, are averaged where windows overlap. A side shorter than the crop is taken whole. Where one window covers
    the image the result equals ``whole`` exactly.

    Args:
        segmenter: gives an output with ``logits`` ``[B, C, h, w]`` for images ``[B, 3, h, w]`` in [0, 1].
        images: ``[3, h, w]`` or ``[B, 3, h, w]`` in [0, 1].
        crop: (height, width) of a window; needed for ``sliding``, without meaning for ``whole``.
        stride: (down, across); None for two thirds of the crop (341 for 512), rounded down.
        mode: ``whole`` or ``sliding``.

    Returns:
        ``[B, C, h, w]``, B = 1 for a single image.

    Raises:
        UserError: unknown mode, no crop to slide, or a stride that would leave gaps.
    """
    images = images if images.ndim == 4 else images[None]
    height, width = images.shape[-2:]
    if mode == "whole":
        return segmenter(images).logits
    if mode != "sliding":
        raise UserError("--mode", mode, "choose whole or sliding")
    if crop is None or min(crop) < 1:
        raise UserError("--crop", crop, "sliding windows need a size, e.g. 512")
    stride = stride or (max(1, crop[0] * 2 // 3), max(1, crop[1] * 2 // 3))
    if not (1 <= stride[0] <= crop[0] and 1 <= stride[1] <= crop[1]):
        given, most = f"{stride[0]}x{stride[1]}", f"{crop[0]}x{crop[1]}"
        raise UserError("--stride", given, f"must be between 1 and the crop {most}, or windows would leave gaps")
    tops, lefts = window_starts(height, crop[0], stride[0]), window_starts(width, crop[1], stride[1])
    if len(tops) == len(lefts) == 1:
        return segmenter(images).logits
    total: Tensor | None = None
    times = images.new_zeros(height, width)
    for top in tops:
        for left in lefts:
            place = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
            logits = segmenter(images[place]).logits
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[place] += logits
            times[place] += 1
    assert total is not None
    return total / times


@torch.no_grad()
def evaluate_segmentation(
    segmenter: Segmenter,
    loader: Iterable[Sequence[Mapping[str, Any]]],
    *,
    device: torch.device | str,
    crop: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    mode: Mode = "whole",
    total: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Score a segmenter over pictures with masks, in evaluation mode and without gradients.

    Pictures of one size that come in one batch are run together. Logits are brought to each mask's own size (bilinear)
    before the best class is taken.

    Args:
        segmenter: as `predict_logits` takes it, with ``num_classes``, on ``device``; its mode is put back afterwards.
        loader: batches as sequences of ``{"image": uint8 [3, h, w], "mask": uint8 [H, W], ...}`` or, for a picture that
            cannot be read, ``{"problem": reason, ...}``, which is counted and not scored.
        device: where to run.
        crop: see `predict_logits`.
        stride: see `predict_logits`.
        mode: see `predict_logits`.
        total: a tensor -> its sum over processes, where each has a share of the pictures; None for a single process.

    Returns:
        The scores of `ConfusionMatrix.scores`, and the numbers of ``images`` scored and ``skipped``.

    Raises:
        UserError: as `predict_logits`, or not one picture could be scored.
    """
    confusion = ConfusionMatrix(segmenter.num_classes, device)
    numbers = torch.zeros(2, dtype=torch.int64, device=device)
    was_training = segmenter.training
    segmenter.eval()
    try:
        for batch in loader:
            read = [item for item in batch if "problem" not in item]
            numbers += torch.tensor([len(read), len(batch) - len(read)], device=device)
            for items in _by_size(read, segmenter.num_classes):
                images = torch.stack([item["image"] for item in items]).to(device).float() / 255
                logits = predict_logits(segmenter, images, crop=crop, stride=stride, mode=mode)
                for scores, item in zip(logits, items, strict=True):
                    mask = item["mask"].to(device)
                    confusion.update(labels_at(scores, (mask.shape[0], mask.shape[1])), mask)
    finally:
        segmenter.train(was_training)
    if total is not None:
        confusion.reduce(total)
        numbers = total(numbers)
    images_scored, skipped = numbers.tolist()
    return {**confusion.scores(), "images": images_scored, "skipped": skipped}


def labels_at(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The best class of each pixel at another size: ``[C, h, w]`` -> ``[H, W]`` int64.

    Equals ``argmax`` over classes of the logits interpolated (bilinear, ``align_corners=False``) at once, in less memory.

    Args:
        logits: of one picture.
        size: (H, W).
    """
    if tuple(logits.shape[-2:]) == size:
        return logits.argmax(dim=0)
    best: Tensor | None = None
    labels = torch.zeros(size, dtype=torch.int64, device=logits.device)
    for first in range(0, len(logits), _CLASSES_AT_A_TIME):
        some = logits[None, first : first + _CLASSES_AT_A_TIME].float()
        values, found = F.interpolate(some, size=size, mode="bilinear", align_corners=False)[0].max(dim=0)
        better = values > best if best is not None else torch.ones_like(found, dtype=torch.bool)
        labels = torch.where(better, found + first, labels)
        best = values if best is None else torch.where(better, values, best)
    return labels


def _by_size(items: list[Mapping[str, Any]], classes: int) -> list[list[Mapping[str, Any]]]:
    """Items of one size together, no more than whose logits stay small."""
    groups: dict[torch.Size, list[Mapping[str, Any]]] = {}
    for item in items:
        groups.setdefault(item["image"].shape, []).append(item)
    found = []
    for (_, height, width), group in groups.items():
        most = max(1, _MOST_LOGITS // (classes * height * width))
        found += [group[start : start + most] for start in range(0, len(group), most)]
    return found


def overlay(image: Tensor | Image.Image, labels: Tensor | np.ndarray, palette: Any, alpha: float = 0.5) -> Image.Image:
    """A picture with the colours of its labels laid over it; 255 and labels without a colour leave it as it is.

    Args:
        image: uint8 ``[3, H, W]``, or a picture.
        labels: integers ``[H, W]``.
        palette: ``[C, 3]`` red, green, blue of each class, 0 to 255.
        alpha: share of the colour, 0 to 1.
    """
    picture = pil_to_tensor(image.convert("RGB")) if isinstance(image, Image.Image) else image.cpu()
    labels = labels.cpu() if isinstance(labels, Tensor) else torch.from_numpy(np.array(labels))
    colours = np.asarray(palette).tolist()
    found = [number for number in labels.unique().tolist() if 0 <= number < len(colours) and number != IGNORED]
    if found:
        masks = torch.stack([labels == number for number in found])
        drawn = draw_segmentation_masks(picture, masks, alpha=alpha, colors=[tuple(colours[number]) for number in found])
        picture = torch.where(masks.any(dim=0), drawn, picture)  # blending rounds down, where there is no colour too
    return to_pil_image(picture)
