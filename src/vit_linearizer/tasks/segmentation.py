"""Semantic segmentation: cross-entropy at every labelled pixel, and mean intersection over union on held-out pictures.

Source: ViT-Linearizer's evaluation with UperNet (arXiv 2504.00037, section 4), which gives no recipe; its
values are those of the public BEiT one. The auxiliary head's loss counts 0.4.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ..contracts import LossOutput, UserError
from ..data.segmentation import IGNORED
from ..evaluation.processes import sum_over_processes
from ..evaluation.segmentation import Mode, evaluate_segmentation
from ..models.segmenter import Head, Segmenter
from ..models.segmenter_folder import save_segmenter
from .base import Task, compile_each_block


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig:
    """The head, its loss, and how pictures are judged.

    Attributes:
        head: ``upernet`` or ``linear``.
        head_width: channels inside UperNet.
        auxiliary_weight: of UperNet's auxiliary head in the loss.
        crop: (height, width) that the model is trained on, in pixels; None for the model's nominal size.
        mode: pictures are judged ``whole`` or by ``sliding`` windows of the crop's size.
        stride: (down, across) from window to window; None for two thirds of the crop.
    """

    head: Head = "upernet"
    head_width: int = 512
    auxiliary_weight: float = 0.4
    crop: tuple[int, int] | None = None
    mode: Mode = "whole"
    stride: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.head_width < 1:
            raise UserError("--head-width", self.head_width, "must be at least 1")
        if not self.auxiliary_weight >= 0:
            raise UserError("--auxiliary-weight", self.auxiliary_weight, "must be 0 or more")


class Segmentation(Task):
    """A segmenter, trained on pictures with masks.

    Args:
        segmenter: with a class for each of ``classes``.
        config: the loss and how pictures are judged, with a crop.
        classes: names of the classes.
        palette: ``[C, 3]`` red, green, blue of each class.
        noted: what a later prediction needs to know besides, as JSON (see `save_segmenter`).
        passed_over: held-out pictures that cannot be judged on and are in no loader; counted as skipped.
    """

    score = ("miou", False)

    def __init__(
        self,
        segmenter: Segmenter,
        config: SegmentationConfig,
        *,
        classes: tuple[str, ...],
        palette: Any,
        noted: dict[str, Any],
        passed_over: int = 0,
    ):
        super().__init__()
        self.segmenter = segmenter
        self.config = config
        self.classes, self.palette, self.noted = classes, palette, noted
        self.passed_over = passed_over

    @property
    def backbone(self) -> nn.Module:
        return self.segmenter.backbone

    def save(self, folder: Path) -> None:
        save_segmenter(self.segmenter, folder, classes=self.classes, palette=self.palette, extra=self.noted)

    def compile_blocks(self) -> None:
        compile_each_block(self.segmenter.backbone)

    def forward(self, batch: dict[str, Tensor]) -> LossOutput:
        """Loss of images ``[B, 3, H, W]`` in [0, 1] with masks ``[B, H, W]``; ignored pixels count as 0."""
        logits, auxiliary = self.segmenter(batch["images"])
        target = batch["masks"].long()
        loss = _cross_entropy(logits, target)
        terms = {"cross_entropy": loss.detach()}
        if auxiliary is not None:
            extra = _cross_entropy(auxiliary, target)
            terms["auxiliary_cross_entropy"] = extra.detach()
            loss = loss + self.config.auxiliary_weight * extra
        return LossOutput(loss=loss, terms=terms)

    def evaluate(self, held_out: DataLoader, bank: DataLoader | None, device: torch.device) -> dict[str, Any]:
        """``miou``, ``pixel_accuracy``, ``mean_accuracy`` in percent, ``images``, ``skipped``; ``iou`` by class name."""
        scores = evaluate_segmentation(
            self.segmenter,
            held_out,
            device=device,
            crop=self.config.crop,
            stride=self.config.stride,
            mode=self.config.mode,
            total=functools.partial(sum_over_processes, device=device),
        )
        scores["skipped"] += self.passed_over
        return {**scores, "iou": dict(zip(self.classes, scores["iou"], strict=True))}


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Sum over labelled pixels, over the number of all: so that every pixel counts alike however a batch is divided."""
    return F.cross_entropy(logits.float(), target, ignore_index=IGNORED, reduction="sum") / target.numel()
