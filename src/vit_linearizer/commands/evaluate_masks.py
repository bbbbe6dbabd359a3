"""What ``evaluate`` does with segmentation runs: their mean intersection over union on pictures with masks."""

import logging
from typing import Any, Literal

import torch

from ..contracts import UserError
from ..data.datasets import SkippedList
from ..data.segmentation import SegmentationEvaluationSet, SegmentationKind, evaluation_loader, open_segmentation
from ..evaluation.segmentation import evaluate_segmentation
from ..models.segmenter_folder import load_segmenter

logger = logging.getLogger("vit_linearizer")


def measure_segmenters(
    models: tuple[str, ...],
    data: str,
    dataset: SegmentationKind,
    *,
    split: Literal["train", "val"] = "val",
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Score segmentation runs as they were scored in training: by their crop, whole or by sliding windows.

    Args:
        models: run or model folders of ``segment``.
        data: folder of the data set.
        dataset: what lies there.
        split: which part.
        batch_size: pictures at a time; those of one size go together.
        num_workers: processes that load pictures.
        device: where to run.

    Returns:
        By model: ``miou``, ``pixel_accuracy``, ``mean_accuracy`` in percent, ``iou`` by class name, ``images``, ``skipped``.

    Raises:
        UserError: no segmentation run, or one of other classes than the data's.
    """
    source = open_segmentation(data, dataset, split)
    found = {name: load_segmenter(name, name="--models") for name in models}
    for name, (_, info) in found.items():
        if info.classes != source.classes:
            ours, theirs = (f"{len(names)} ({', '.join(names[:4])} ...)" for names in (info.classes, source.classes))
            remedy = f"has the classes {ours}, the data {theirs}; give the data it was made for, classes in their order"
            raise UserError("--models", name, remedy)
    results = {}
    for name, (segmenter, info) in found.items():
        height, width = info.extra["crop"]
        down, across = info.extra["stride"] or (None, None)
        crop, stride = (height, width), (down, across) if down and across else None
        pictures = SegmentationEvaluationSet(source, crop, SkippedList(None))
        scores = evaluate_segmentation(
            segmenter.to(device),
            evaluation_loader(pictures, batch_size=batch_size, num_workers=num_workers),
            device=device,
            crop=crop,
            stride=stride,
            mode=info.extra["mode"],
        )
        scores["skipped"] += len(source.skipped)
        results[name] = {**scores, "iou": dict(zip(info.classes, scores["iou"], strict=True))}
        logger.info("%s: mIoU %.2f on %d pictures (%d skipped)", name, scores["miou"], scores["images"], scores["skipped"])
    return results
