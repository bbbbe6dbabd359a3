"""A model as the program that is exported, and its capture by ``torch.export`` with free batch, height and width."""

from typing import Any

import timm.data
import torch
import torch.fx.experimental._config as fx_config
import torch.nn as nn
from torch import Tensor
from torch.export import Dim, ExportedProgram

from ..contracts import UserError
from ..models.adapters import final_patches, nominal_size, patch_grid, patch_size

#: Bounds of what a dynamic program takes: images in a batch, patches along a side.
_MOST_IMAGES, _MOST_PATCHES = 2**16, 2**12


class Program(nn.Module):
    """Images to outputs by name.

    Args:
        model: a plain timm model.
        normalize: whether the program takes images in [0, 1] and normalises them itself.
        dense: whether it also gives the final patch features as a map.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, *, normalize: bool, dense: bool):
        super().__init__()
        self.model, self.normalize, self.dense = model.eval(), normalize, dense
        config = timm.data.resolve_model_data_config(model)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name], dtype=torch.float32).view(1, -1, 1, 1))

    @property
    def output_names(self) -> list[str]:
        """``logits`` of a classifier or ``features`` (pooled) of a backbone, then ``dense``."""
        first = "logits" if getattr(self.model, "num_classes", 0) else "features"
        return [first, "dense"] if self.dense else [first]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """``[B, 3, H, W]`` to ``[B, classes or D]`` as the model's own forward, and with ``dense`` ``[B, D, H/p, W/p]``."""
        model: Any = self.model
        if self.normalize:
            images = (images - self.mean) / self.std
        if not self.dense:
            return (model(images),)
        height, width = patch_size(model)
        grid = [images.shape[-2] // height, images.shape[-1] // width]
        features = model.forward_features(images)
        patches = final_patches(model, features)
        return model.forward_head(features), patches.transpose(1, 2).unflatten(2, grid)


def capture(program: Program, image_size: tuple[int, int], *, dynamic: bool) -> ExportedProgram:
    """Record a program; the batch is always free, with ``dynamic`` height and width too (multiples of the patch).

    Raises:
        UserError: the model cannot be recorded so.
    """
    shape: dict[int, Any] = {0: Dim("batch", min=1, max=_MOST_IMAGES)}
    size = image_size
    if dynamic:
        sides = zip((2, 3), ("patches_down", "patches_across"), patch_size(program.model), strict=True)
        shape |= {axis: side * Dim(name, min=1, max=_MOST_PATCHES) for axis, name, side in sides}
        # A side of one patch in the example would be taken for one of always one patch.
        height, width = (max(s, 2 * p) for s, p in zip(image_size, patch_size(program.model), strict=True))
        size = (height, width)
    # Without this setting every comparison of two sizes on the way would tie the program to the example's.
    with torch.no_grad(), fx_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        try:
            exported = torch.export.export(program, (torch.rand(2, 3, *size),), dynamic_shapes=(shape,))
        except Exception as error:  # many kinds, all meaning that this model's code does not allow it
            reason = " ".join(str(error).split())[:300]
            remedy = "leave out --dynamic" if dynamic else "report the model's name"
            field = "--dynamic" if dynamic else "--model"
            raise UserError(field, type(program.model).__name__, f"cannot be captured ({reason}); {remedy}") from error
    _check_operators(exported)
    for module in exported.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # file names of the machine that exported
    return exported


def _check_operators(exported: ExportedProgram) -> None:
    """Only ATen operators, so that the program runs wherever PyTorch's own operators do."""
    for node in exported.graph.nodes:
        operator = node.op == "call_function" and isinstance(node.target, torch._ops.OperatorBase)
        if operator and not str(node.target).startswith("aten."):
            raise RuntimeError(f"the exported program holds {node.target}, which is no ATen operator")


def example_sizes(model: nn.Module, image_size: tuple[int, int], *, dynamic: bool) -> list[tuple[int, int, int]]:
    """(batch, height, width) at which an exported program is compared: two sizes other than the recorded one, if it may."""
    if not dynamic:
        return [(1, *image_size), (3, *image_size)]
    (down, across), (height, width) = patch_grid(model, image_size), patch_size(model)
    larger = (round(down * 8 / 7) + (down < 4), round(across * 10 / 7) + (across < 2))
    return [(1, *image_size), (1, larger[0] * height, larger[1] * width), (3, 2 * down * height, across * width)]


def example_size(model: nn.Module, asked: tuple[int, int] | None) -> tuple[int, int]:
    """The image size to record at: the one asked for, else the model's own."""
    size = asked or nominal_size(model)
    patch_grid(model, size)
    return size
