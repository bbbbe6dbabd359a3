"""The papers' tables as values, by name. A recipe is a function of the student's architecture: tables differ by size."""

from collections.abc import Callable

from ..contracts import UserError, did_you_mean
from .base import DistillationRecipe
from .linearizer import digits, linearizer, regression, smoke

RECIPES: dict[str, Callable[[str], DistillationRecipe]] = {
    "linearizer": linearizer,
    "regression": regression,
    "digits": digits,
    "smoke": smoke,
}


def find_recipe(name: str, architecture: str) -> DistillationRecipe:
    """A recipe by name, for a student of an architecture (its timm name).

    Raises:
        UserError: there is none of that name.
    """
    if name not in RECIPES:
        raise UserError("--recipe", name, f"unknown recipe; there are {', '.join(RECIPES)}{did_you_mean(name, RECIPES)}")
    return RECIPES[name](architecture)


__all__ = ["RECIPES", "DistillationRecipe", "find_recipe"]
