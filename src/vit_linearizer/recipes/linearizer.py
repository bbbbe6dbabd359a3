"""ViT-Linearizer's distillation (arXiv 2504.00037, table 8), its baseline, and two small recipes for trying things out.

    vit-linearizer distill --teacher vit_base_patch16_clip_224.openai --student adventurer_base_patch16_224
        --data IMAGENET/train --out RUN

The paper reaches 84.3 % ImageNet top-1 with that after fine-tuning. Not in the table, so choices: three repeats of repeated
augmentation, and drop path rising linearly over the blocks.
"""

from collections.abc import Callable
from dataclasses import replace

from ..data.views import ViewConfig
from ..tasks import DistillationConfig
from ..training.config import OptimisationConfig
from .base import DistillationRecipe


def linearizer(architecture: str) -> DistillationRecipe:
    """Table 8: its Small/Base column, or its Large column for a large student; tiny, which it lacks, takes Small/Base."""
    large = "_large_" in architecture
    return DistillationRecipe(
        optimisation=OptimisationConfig(
            epochs=300,
            batch_size=2048,
            learning_rate=1.5e-3,
            minimum_learning_rate=1e-5,
            weight_decay=0.05,
            betas=(0.9, 0.999),
            warmup_epochs=20 if large else 10,
            layer_decay=None,
            clip_norm=None,
        ),
        views=ViewConfig(augmentation="three", smallest_crop=0.08, horizontal_flip=0.5, repeats=3),
        objectives=DistillationConfig(),
        drop_path=0.2 if large else 0.1,
    )


def regression(architecture: str) -> DistillationRecipe:
    """The baseline: the same training with plain final-feature regression on unmasked images instead."""
    objectives = DistillationConfig(
        mask_ratio=0.0,
        activation_matching_weight=0.0,
        masked_prediction_weight=0.0,
        feature_regression_weight=1.0,
    )
    return replace(linearizer(architecture), objectives=objectives)


def digits(architecture: str) -> DistillationRecipe:
    """`linearizer` for the quickstart's small pictures: minutes on two cores.

    Digits are not mirrored, cropped or recoloured, and half of their 64 patches stay visible instead of a quarter: a
    patch is hardly more than a pixel of the original there (chosen on the training digits, see LOG.md).
    """
    return replace(
        linearizer(architecture),
        optimisation=OptimisationConfig(
            epochs=20,
            batch_size=32,
            learning_rate=3e-3,
            minimum_learning_rate=1e-5,
            weight_decay=0.05,
            warmup_epochs=2,
        ),
        views=ViewConfig(augmentation="affine", repeats=1),
        objectives=DistillationConfig(mask_ratio=0.5),
        drop_path=0.0,
        scales_learning_rate=False,
    )


def smoke(architecture: str) -> DistillationRecipe:
    """A few seconds: one epoch of tiny batches, to see that everything runs."""
    optimisation = OptimisationConfig(
        epochs=1, batch_size=4, learning_rate=1e-3, minimum_learning_rate=1e-5, warmup_epochs=0
    )
    return replace(linearizer(architecture), optimisation=optimisation, scales_learning_rate=False)


DISTILLATION: dict[str, Callable[[str], DistillationRecipe]] = {
    "linearizer": linearizer,
    "regression": regression,
    "digits": digits,
    "smoke": smoke,
}
