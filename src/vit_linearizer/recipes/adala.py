"""ViT-AdaLA (arXiv 2603.16063): a teacher turned into its own linear ViT, in two stages without labels.

    vit-linearizer distill --recipe adala --teacher vit_large_patch14_dinov2.lvd142m --data IMAGENET/train --out RUN

The paper's third stage is ``finetune`` or ``segment`` on the result; it reaches 86.0 % ImageNet top-1 at 512 with DINOv2-L
(86.8 with softmax). It publishes neither rates, steps nor batches, so all values here are choices: a few passes with a high
rate for queries, keys and values alone, then more with a low one for everything, both on a cosine.
"""

from collections.abc import Callable
from dataclasses import replace

from ..data.views import ViewConfig
from ..tasks import DistillationConfig
from ..training.config import OptimisationConfig
from .base import AdaptationRecipe, AttentionRecipe, DistillationRecipe


def adala(_architecture: str = "") -> AdaptationRecipe:
    """Attention alignment, then feature alignment of the whole student, on whole images."""
    optimisation = OptimisationConfig(
        epochs=4,
        batch_size=256,
        learning_rate=1e-3,
        minimum_learning_rate=1e-6,
        weight_decay=0.0,
        warmup_epochs=0.5,
    )
    views = ViewConfig(augmentation="crop", smallest_crop=0.25, horizontal_flip=0.5, repeats=1)
    return AdaptationRecipe(
        attention=AttentionRecipe(optimisation=optimisation, views=views, drop_path=0.0),
        feature=DistillationRecipe(
            optimisation=replace(optimisation, epochs=20, learning_rate=1e-4, weight_decay=0.01, warmup_epochs=1),
            views=views,
            objectives=DistillationConfig(
                mask_ratio=0.0,
                activation_matching_weight=0.0,
                masked_prediction_weight=0.0,
                feature_alignment_weight=1.0,
            ),
            drop_path=0.0,
        ),
    )


def adala_digits(_architecture: str = "") -> AdaptationRecipe:
    """`adala` for the quickstart's small pictures: a minute on two cores (see LOG.md)."""
    base = adala()
    views = ViewConfig(augmentation="affine", repeats=1)

    def small(optimisation: OptimisationConfig, epochs: int, learning_rate: float) -> OptimisationConfig:
        return replace(
            optimisation,
            epochs=epochs,
            batch_size=32,
            learning_rate=learning_rate,
            minimum_learning_rate=1e-5,
            warmup_epochs=1,
        )

    return replace(
        base,
        attention=replace(
            base.attention,
            optimisation=small(base.attention.optimisation, 4, 6e-3),
            views=views,
            scales_learning_rate=False,
        ),
        feature=replace(
            base.feature,
            optimisation=small(base.feature.optimisation, 12, 3e-3),
            views=views,
            scales_learning_rate=False,
        ),
    )


ADAPTATION: dict[str, Callable[[str], AdaptationRecipe]] = {"adala": adala, "adala_digits": adala_digits}
