"""Semantic segmentation with UperNet, and light recipes for small data on a small machine.

    vit-linearizer segment --model RUN --data ADEChallengeData2016 --dataset ade20k --out RUN3

ViT-Linearizer (arXiv 2504.00037, section 4) reports 51.3 mIoU on ADE20K and 82.0 on Cityscapes for a base student distilled
from CLIP ViT-B/16, with UperNet, and gives no recipe. All values here are choices: for ADE20K those of the public BEiT
recipe that this line of work follows; for Cityscapes the same at 512x1024, the size that the paper names.
"""

from collections.abc import Callable
from dataclasses import replace

from ..data.segmentation import SegmentationViewConfig
from ..tasks import SegmentationConfig
from ..training.config import OptimisationConfig
from .base import SegmentationRecipe


def segment_ade20k(_architecture: str = "") -> SegmentationRecipe:
    """UperNet on 512x512 crops, judged by sliding windows every 341 pixels (two thirds of a crop)."""
    return SegmentationRecipe(
        optimisation=OptimisationConfig(
            iterations=160_000,
            batch_size=16,
            learning_rate=8e-5,
            minimum_learning_rate=0.0,
            weight_decay=0.05,
            betas=(0.9, 0.999),
            schedule="poly",
            warmup_iterations=1500,
            layer_decay=0.75,
        ),
        views=SegmentationViewConfig(scales=(0.5, 2.0), horizontal_flip=0.5, colour=True, largest_class_share=0.75),
        objectives=SegmentationConfig(
            head="upernet", head_width=512, auxiliary_weight=0.4, crop=(512, 512), mode="sliding", stride=None
        ),
        drop_path=0.1,
    )


def segment_cityscapes(_architecture: str = "") -> SegmentationRecipe:
    """The same on pictures resized to 512x1024, judged whole."""
    base = segment_ade20k()
    return replace(base, objectives=replace(base.objectives, crop=(512, 1024), mode="whole"))


def segment_folder(_architecture: str = "") -> SegmentationRecipe:
    """Small data on a small machine: a linear head, minutes. No paper's."""
    return SegmentationRecipe(
        optimisation=OptimisationConfig(
            iterations=2000,
            batch_size=8,
            learning_rate=1e-3,
            minimum_learning_rate=0.0,
            schedule="poly",
            warmup_iterations=200,
        ),
        views=SegmentationViewConfig(),
        objectives=SegmentationConfig(head="linear"),
        drop_path=0.0,
    )


def smoke(_architecture: str = "") -> SegmentationRecipe:
    """A few seconds: a handful of tiny steps, to see that everything runs."""
    base = segment_folder()
    return replace(base, optimisation=replace(base.optimisation, iterations=4, batch_size=2, warmup_iterations=0))


SEGMENTATION: dict[str, Callable[[str], SegmentationRecipe]] = {
    "segment_ade20k": segment_ade20k,
    "segment_cityscapes": segment_cityscapes,
    "segment_folder": segment_folder,
    "smoke": smoke,
}
