"""ViT-Linearizer's supervised fine-tuning (arXiv 2504.00037, table 9), and two small recipes for trying things out.

    vit-linearizer finetune --model RUN --data IMAGENET --out RUN2

The paper reaches 84.3 % ImageNet top-1 with a base student distilled from CLIP ViT-B/16, 82.6 % with one from scratch. Not
in the table, so choices: label smoothing 0.1, drop path rising linearly over the blocks, crops of 8 % and more, and the same
values at 448 and with patches of 8. Mixup, CutMix, weight averages and clipping are not named there and are off.
"""

from collections.abc import Callable
from dataclasses import replace

from ..data.views import ViewConfig
from ..tasks import ClassificationConfig
from ..training.config import OptimisationConfig
from .base import ClassificationRecipe


def finetune_base(_architecture: str = "") -> ClassificationRecipe:
    """Table 9, its Small/Base column. A fifth of the run is warm-up, and stays so in a shorter run."""
    return ClassificationRecipe(
        optimisation=OptimisationConfig(
            epochs=100,
            batch_size=1024,
            learning_rate=5e-4,
            minimum_learning_rate=1e-6,
            weight_decay=0.05,
            betas=(0.9, 0.999),
            warmup_epochs=20,
            warmup_share=0.2,
            layer_decay=0.65,
            clip_norm=None,
        ),
        views=ViewConfig(augmentation="rand", smallest_crop=0.08, horizontal_flip=0.5, repeats=1),
        objectives=ClassificationConfig(label_smoothing=0.1),
        drop_path=0.4,
    )


def finetune_small(_architecture: str = "") -> ClassificationRecipe:
    """Table 9, its Small/Base column: the values of `finetune_base`."""
    return finetune_base()


def finetune_large(_architecture: str = "") -> ClassificationRecipe:
    """Table 9, its Large column."""
    base = finetune_base()
    optimisation = replace(base.optimisation, epochs=50, warmup_epochs=5, warmup_share=0.1, layer_decay=0.8)
    return replace(base, optimisation=optimisation, drop_path=0.6)


def digits(_architecture: str = "") -> ClassificationRecipe:
    """For the quickstart's small pictures: a minute on two cores. Not the paper's (see LOG.md)."""
    return ClassificationRecipe(
        optimisation=OptimisationConfig(
            epochs=28,
            batch_size=32,
            learning_rate=1e-3,
            minimum_learning_rate=1e-5,
            warmup_epochs=2,
        ),
        views=ViewConfig(augmentation="affine", repeats=1),
        objectives=ClassificationConfig(label_smoothing=0.0),
        drop_path=0.0,
        scales_learning_rate=False,
    )


def smoke(_architecture: str = "") -> ClassificationRecipe:
    """A few seconds: one epoch of tiny batches, to see that everything runs."""
    optimisation = OptimisationConfig(epochs=1, batch_size=4, learning_rate=1e-3, minimum_learning_rate=1e-5)
    return replace(finetune_base(), optimisation=optimisation, scales_learning_rate=False)


FINE_TUNING: dict[str, Callable[[str], ClassificationRecipe]] = {
    "finetune_small": finetune_small,
    "finetune_base": finetune_base,
    "finetune_large": finetune_large,
    "digits": digits,
    "smoke": smoke,
}


def finetuning_recipe(architecture: str) -> str:
    """The name of the column that fits an architecture's size; tiny, which the table lacks, takes Small/Base."""
    return next((f"finetune_{size}" for size in ("small", "large") if f"_{size}_" in architecture), "finetune_base")
