"""What is measured: a case is a model at an image size, a patch, a precision and a kind of attention.

Everything that can be wrong with a case is found here, on the meta device, before the first one is measured. So are its
tokens and its FLOPs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from ..contracts import UserError
from ..models.adapters import check_plain, patch_size
from ..models.loading import probe_backbone
from ..models.released import RELEASED

#: An image size and a patch; None stands for each model's own.
Shape = tuple[tuple[int, int], int | None]

DEFAULT_SIZES = ("224", "448", "512x1024", "1024x1024")

#: Rows of the papers' tables, and the sequences up to 50,176 patches that linear mixers are praised for.
PRESETS: dict[str, tuple[tuple[tuple[int, int], int | None], ...]] = {
    "imagenet": (((224, 224), None), ((448, 448), None), ((448, 448), 8)),
    "ade20k": (((512, 512), None),),
    "cityscapes": (((512, 1024), None),),
    "long": tuple(((side, side), None) for side in (512, 1024, 1792, 2560, 3584)),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure.

    Attributes:
        model: whatever `models.loading.open_model` takes; a timm name means the architecture with random weights.
        image_size: (height, width).
        patch_size: (height, width) of a patch.
        patch_argument: the patch as an argument of the architecture, or None where it is the model's own.
        precision: fp32 or bf16.
        attention: fused or eager; none for a model without attention.
        tokens: patches of one image.
        flops: of one image's forward pass, counted.
        parameters: of the model.
    """

    model: str
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    patch_argument: int | None
    precision: str
    attention: str
    tokens: int
    flops: int
    parameters: int

    @property
    def title(self) -> str:
        return " ".join([variant_name(self.model, self.attention), self.precision, "at", size_text(self.image_size)])


def variant_name(model: str, attention: str) -> str:
    """``vit_base_patch16_224 eager``; a model without attention goes by its name alone."""
    return model if attention == "none" else f"{model} {attention}"


def size_text(size: Sequence[int]) -> str:
    """``512x1024``."""
    return "x".join(str(side) for side in size)


def patch_text(sides: Sequence[int]) -> str:
    """``16``; ``16x8`` for a patch that is not square."""
    return str(sides[0]) if len(set(sides)) == 1 else size_text(sides)


def preset_shapes(preset: str, patch: int | None) -> list[Shape]:
    """The image sizes and patches of a preset; ``patch`` stands where the preset leaves the patch open."""
    return list(dict.fromkeys((size, own or patch) for size, own in PRESETS[preset]))


def plan_cases(
    models: Sequence[str], shapes: Sequence[Shape], precisions: Sequence[str], attentions: Sequence[str]
) -> list[list[Case]]:
    """All cases, in groups of one image size and patch each; groups stand in the order of their tokens.

    Raises:
        UserError: an unknown model, one without patches, or an image size that is no multiple of a patch.
    """
    own = {model: _probe(model) for model in dict.fromkeys(models)}
    for name, model in own.items():
        check_plain(model, name, field="--models")
    for size, patch in shapes:
        for name, model in own.items():
            sides = (patch, patch) if patch else patch_size(model)
            if size[0] % sides[0] or size[1] % sides[1]:
                remedy = f"is no multiple of the patch {patch_text(sides)} of {name}; give another size, or --patch-size"
                raise UserError("--image-sizes", size_text(size), remedy)
    groups = []
    for size, patch in dict.fromkeys(shapes):
        group: list[Case] = []
        for name, model in own.items():
            argument = None if patch is None or patch_size(model) == (patch, patch) else patch
            group += _cases(name, size, argument, precisions, attentions)
        groups.append(group)
    return sorted(groups, key=lambda group: max(case.tokens for case in group))


def _cases(
    name: str, size: tuple[int, int], patch: int | None, precisions: Sequence[str], attentions: Sequence[str]
) -> list[Case]:
    model = _probe(name, **build_arguments(size, patch))
    sides = patch_size(model)
    facts: dict[str, Any] = {
        "model": name,
        "image_size": size,
        "patch_size": sides,
        "patch_argument": patch,
        "tokens": (size[0] // sides[0]) * (size[1] // sides[1]),
        "flops": count_flops(model, size),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    kinds = tuple(dict.fromkeys(attentions)) if attention_modules(model) else ("none",)
    return [
        Case(precision=precision, attention=attention, **facts)
        for precision in dict.fromkeys(precisions)
        for attention in kinds
    ]


def build_arguments(size: tuple[int, int], patch: int | None) -> dict[str, Any]:
    """Arguments of the architecture: built for the very image size, so that no resampling of positions is timed."""
    return {"img_size": size} if patch is None else {"img_size": size, "patch_size": patch}


def attention_modules(model: nn.Module) -> list[Any]:
    """Where timm chooses between fused and eager attention."""
    return [module for module in model.modules() if hasattr(module, "fused_attn")]


@torch.no_grad()
def count_flops(model: nn.Module, size: tuple[int, int]) -> int:
    """FLOPs of one image's forward pass in matrix products and convolutions; the same for both kinds of attention."""
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, *size, device="meta"))
    return counter.get_total_flops()


def _probe(name: str, **model_args: Any) -> nn.Module:
    """The model without weights or memory."""
    if Path(name).is_file() and Path(name).name not in RELEASED:
        raise UserError("--models", name, "is a weight file; give the name of its architecture, which is just as fast")
    return probe_backbone(name, field="--models", **model_args).eval()
