"""Which layer each parameter of a backbone belongs to, for learning rates that decay from layer to layer (timm's)."""

import math
from collections.abc import Callable
from typing import Any

import torch.nn as nn
from timm.models._manipulate import group_with_matcher


def layers_below(prefix: str, backbone: nn.Module, *, coarse: bool = False) -> Callable[[str], tuple[float]]:
    """A matcher as timm's ``group_parameters`` takes it, for a module that holds a backbone and more.

    Args:
        prefix: what the names of the backbone's parameters begin with there.
        backbone: with a ``group_matcher`` of its own.
        coarse: the backbone's coarse groups, where it has such.

    Returns:
        Parameter name -> the ordinal that the backbone gives it; infinity, the full learning rate, for what is not the
        backbone's or what its own matcher does not know.
    """
    any_backbone: Any = backbone
    # A name that no matcher knows shows which number timm gives to what is left over.
    unknown = ""
    names = [*(name for name, _ in backbone.named_parameters()), unknown]
    matcher = any_backbone.group_matcher(coarse=coarse)
    ordinals = group_with_matcher(((name, None) for name in names), matcher, reverse=True)  # type: ignore[arg-type]
    layers = {prefix + name: (float(number),) for name, number in ordinals.items() if number != ordinals[unknown]}
    return lambda name: layers.get(name, (math.inf,))
