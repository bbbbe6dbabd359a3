"""The papers' tables as values, by name. A recipe is a function of the architecture, since tables differ by size."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from ..contracts import UserError, did_you_mean
from .adala import ADAPTATION
from .base import (
    AdaptationRecipe,
    AttentionRecipe,
    ClassificationRecipe,
    DistillationRecipe,
    Recipe,
    SegmentationRecipe,
)
from .finetuning import FINE_TUNING, finetuning_recipe
from .linearizer import DISTILLATION
from .segmentation import SEGMENTATION

R = TypeVar("R")


def find_recipe(recipes: Mapping[str, Callable[[str], R]], name: str, architecture: str) -> R:
    """A recipe by name, for a model of an architecture (its timm name).

    Args:
        recipes: those of one kind of training, e.g. `DISTILLATION`.
        name: of the recipe.
        architecture: of the model that is trained.

    Raises:
        UserError: there is none of that name.
    """
    if name not in recipes:
        raise UserError("--recipe", name, f"unknown recipe; there are {', '.join(recipes)}{did_you_mean(name, recipes)}")
    return recipes[name](architecture)


__all__ = [
    "ADAPTATION",
    "DISTILLATION",
    "FINE_TUNING",
    "SEGMENTATION",
    "AdaptationRecipe",
    "AttentionRecipe",
    "ClassificationRecipe",
    "DistillationRecipe",
    "Recipe",
    "SegmentationRecipe",
    "find_recipe",
    "finetuning_recipe",
]
