"""Any plain timm backbone (ViT, DeiT-III, CLIP, DINOv2, SigLIP, EVA, Adventurer) -> `Features`.

What a backbone must offer is timm's ``forward_intermediates``; nothing here knows a model by name. Images come in [0, 1]:
each backbone brings its own normalisation. Masking replaces the output of ``patch_embed``, before positions are added
(BEiT and MAE order, a choice: the paper does not say), so the sequence keeps its full length.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm.data
import torch
import torch.nn as nn
from timm.layers import to_2tuple
from torch import Tensor

from ..contracts import Features, UserError


def stage_ends(depth: int, stages: int) -> list[int]:
    """0-based blocks that end the K stages: ``floor((k + 1) depth / K) - 1``; 2, 5, 8, 11 of 12.

    A choice: the paper (section 3.2) cuts both models into K stages without saying where.
    """
    if not 1 <= stages <= depth:
        raise UserError("--stages", stages, f"must be between 1 and the backbone's {depth} blocks")
    return [math.floor((k + 1) * depth / stages) - 1 for k in range(stages)]


def patch_size(model: nn.Module) -> tuple[int, int]:
    """Side lengths of a patch, (height, width)."""
    patch_embed: Any = model.patch_embed
    return to_2tuple(patch_embed.patch_size)


def patch_grid(model: nn.Module, image_size: tuple[int, int]) -> tuple[int, int]:
    """Patches down and across for an image size, which must be a multiple of the patch.

    Raises:
        UserError: it is not; the message names the nearest size that is.
    """
    height, width = patch_size(model)
    if image_size[0] % height or image_size[1] % width or min(image_size) <= 0:
        near = [max(1, round(size / side)) * side for size, side in zip(image_size, (height, width), strict=True)]
        given = f"{image_size[0]}x{image_size[1]}"
        raise UserError("image size", given, f"must be a multiple of the patch {height}x{width}; try {near[0]}x{near[1]}")
    return image_size[0] // height, image_size[1] // width


def nominal_size(model: nn.Module) -> tuple[int, int]:
    """The image size, (height, width), that a backbone's position embeddings were made for."""
    any_model: Any = model
    size = getattr(any_model.patch_embed, "img_size", None) or any_model.pretrained_cfg["input_size"][1:]
    return to_2tuple(size)


def check_plain(model: nn.Module, name: str, *, field: str = "model") -> None:
    """Refuse backbones without one grid of patch tokens from first block to last (Swin, ConvNeXt, ...)."""
    needed = ("patch_embed", "num_prefix_tokens", "feature_info", "forward_intermediates")
    plain = all(hasattr(model, attribute) for attribute in needed) and hasattr(model.patch_embed, "patch_size")
    if not plain or "return_prefix_tokens" not in inspect.signature(model.forward_intermediates).parameters:  # type: ignore[arg-type]
        raise UserError(field, name, "is not a plain backbone of patch tokens; use a ViT, e.g. vit_base_patch16_224")
    if getattr(model, "in_chans", 3) != 3:
        raise UserError(field, name, f"takes {model.in_chans} channels; images have 3")


def normalize(model: nn.Module, images: Tensor) -> Tensor:
    """Images in [0, 1] with the mean and deviation that a backbone was trained with (timm's ``pretrained_cfg``)."""
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[k], device=images.device, dtype=images.dtype).view(-1, 1, 1) for k in ("mean", "std"))
    return (images - mean) / std


def extract_features(
    model: nn.Module,
    images: Tensor,
    *,
    stages: int = 1,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
) -> Features:
    """Run a backbone on images and return what every objective and every evaluation reads.

    Args:
        model: a plain timm backbone.
        images: ``[B, 3, H, W]`` in [0, 1].
        stages: number of stages K, see `stage_ends`.
        mask: ``[B, N]`` bool, True where a patch is replaced by the mask token; None for none.
        mask_token: ``[1, 1, D]``, needed with ``mask``.

    Returns:
        `Features` with K stages.
    """
    model_any: Any = model
    grid = patch_grid(model, (images.shape[-2], images.shape[-1]))
    ends = stage_ends(len(model_any.feature_info), stages)
    prefix = model_any.num_prefix_tokens
    with _masked_patches(model, mask, mask_token):
        final, intermediates = model_any.forward_intermediates(
            normalize(model, images), indices=ends, return_prefix_tokens=prefix > 0, output_fmt="NLC"
        )
    final = _final_norm(model, final)
    has_class_token = prefix > 0 and getattr(model, "cls_token", None) is not None
    found = []
    for stage in intermediates:
        tokens, prefix_tokens = stage if isinstance(stage, tuple | list) else (stage, None)
        class_token = prefix_tokens[:, 0] if has_class_token and prefix_tokens is not None else None
        found.append(Features(tokens=tokens, grid=grid, class_token=class_token))
    class_token = final[:, 0] if has_class_token else None
    return Features(tokens=final[:, prefix:], grid=grid, class_token=class_token, stages=tuple(found))


def final_patches(model: nn.Module, features: Tensor) -> Tensor:
    """Patch tokens ``[B, N, D]`` of `extract_features` from what a backbone's own ``forward_features`` returns."""
    model_any: Any = model
    return _final_norm(model, features)[:, model_any.num_prefix_tokens :]


def _final_norm(model: nn.Module, features: Tensor) -> Tensor:
    """Average-pooled ViTs keep their final norm behind the pooling; others have applied it."""
    if isinstance(getattr(model, "norm", None), nn.Identity) and hasattr(model, "fc_norm"):
        return model.fc_norm(features)  # type: ignore[operator]  # a norm layer
    return features


def behind_features(model: nn.Module) -> list[nn.Module]:
    """Modules of a backbone that come after the features of `extract_features`: pooling and classifier."""
    names = ["attn_pool", "fc_norm", "head_drop", "head", "head_dist"]
    if isinstance(getattr(model, "norm", None), nn.Identity):
        names.remove("fc_norm")  # the final norm itself, see `_final_norm`
    return [module for name in names if isinstance(module := getattr(model, name, None), nn.Module)]


@contextmanager
def _masked_patches(model: nn.Module, mask: Tensor | None, mask_token: Tensor | None) -> Iterator[None]:
    if mask is None:
        yield
        return
    if mask_token is None:
        raise ValueError("a mask needs a mask_token")

    def replace(_module: nn.Module, _inputs: Any, patches: Tensor) -> Tensor:
        # Patch embeddings come as [B, N, D], or as [B, H, W, D] from ViTs with dynamic image sizes.
        chosen = mask.view(*patches.shape[:-1], 1)
        return torch.where(chosen, mask_token.to(patches.dtype).view(-1), patches)

    handle = model.patch_embed.register_forward_hook(replace)  # type: ignore[union-attr, operator, arg-type]
    try:
        yield
    finally:
        handle.remove()
