"""The Adventurers that timm knows by name, and how weights of another size are fitted to them.

Source: sizes of Adventurer (arXiv 2410.07599) and of ViT-Linearizer's table 7 (arXiv 2504.00037).
"""

import math
from typing import Any

from timm.layers import resample_patch_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._input import get_pretrained_grid_size, update_model_args
from torch import Tensor

from ..ops import resample_position_embedding
from .adventurer import Adventurer


def _fit_checkpoint(state_dict: dict[str, Tensor], model: Adventurer) -> dict[str, Tensor]:
    """Bring weights of another patch or image size to the model's: timm's hook between file and model.

    Raises:
        ValueError: the position embedding belongs to no grid that could be meant.
    """
    state_dict = dict(state_dict.get("model", state_dict))  # type: ignore[arg-type]
    patch, positions = state_dict.get("patch_embed.proj.weight"), state_dict.get("pos_embed")
    if positions is not None and positions.shape[1] > 1:
        old_grid = get_pretrained_grid_size(model, patch, positions.shape[1] - 1)
        old_grid = old_grid or (math.isqrt(positions.shape[1] - 1),) * 2
        if old_grid[0] * old_grid[1] != positions.shape[1] - 1:
            raise ValueError(f"pos_embed has {positions.shape[1]} positions, which is no square grid and a class token")
        state_dict["pos_embed"] = resample_position_embedding(positions, old_grid, model.patch_embed.grid_size)
    if patch is not None and patch.shape[-2:] != model.patch_embed.proj.weight.shape[-2:]:
        size = list(model.patch_embed.proj.weight.shape[-2:])
        state_dict["patch_embed.proj.weight"] = resample_patch_embed(patch, size)
    return state_dict


def _cfg(patch_size: int, img_size: int = 224) -> dict[str, Any]:
    return dict(
        num_classes=1000,
        input_size=(3, img_size, img_size),
        min_input_size=(3, patch_size, patch_size),
        pool_size=None,
        crop_pct=0.9,
        interpolation="bicubic",
        first_conv="patch_embed.proj",
        classifier="head",
        paper_ids="arXiv:2410.07599",
    )


_SIZES = {16: ("tiny", "small", "base", "large"), 14: ("small", "base", "large"), 8: ("base",)}
default_cfgs = generate_default_cfgs(
    {f"adventurer_{size}_patch{patch}_224": _cfg(patch) for patch, sizes in _SIZES.items() for size in sizes}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> Adventurer:
    model = build_model_with_cfg(
        Adventurer,
        variant,
        pretrained,
        pretrained_filter_fn=_fit_checkpoint,
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **kwargs,
    )
    update_model_args(model, flip=kwargs.get("flip", "alternate"))  # saved even where it is today's default
    return model


_TINY = dict(embed_dim=256, depth=12)
_SMALL = dict(embed_dim=512, depth=12)
_BASE = dict(embed_dim=768, depth=12)
_LARGE = dict(embed_dim=1024, depth=24)


@register_model
def adventurer_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-T/16, 11.6 M parameters."""
    return _create("adventurer_tiny_patch16_224", pretrained, **{**_TINY, "patch_size": 16, **kwargs})


@register_model
def adventurer_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-S/16, 44 M parameters."""
    return _create("adventurer_small_patch16_224", pretrained, **{**_SMALL, "patch_size": 16, **kwargs})


@register_model
def adventurer_small_patch14_224(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-S/14."""
    return _create("adventurer_small_patch14_224", pretrained, **{**_SMALL, "patch_size": 14, **kwargs})


@register_model
def adventurer_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-B/16, 99 M parameters."""
    return _create("adventurer_base_patch16_224", pretrained, **{**_BASE, "patch_size": 16, **kwargs})


@register_model
def adventurer_base_patch14_224(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-B/14."""
    return _create("adventurer_base_patch14_224", pretrained, **{**_BASE, "patch_size": 14, **kwargs})


@register_model
def adventurer_base_patch8_224(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-B/8."""
    return _create("adventurer_base_patch8_224", pretrained, **{**_BASE, "patch_size": 8, **kwargs})


@register_model
def adventurer_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-L/16, 346 M parameters."""
    return _create("adventurer_large_patch16_224", pretrained, **{**_LARGE, "patch_size": 16, **kwargs})


@register_model
def adventurer_large_patch14_224(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-L/14."""
    return _create("adventurer_large_patch14_224", pretrained, **{**_LARGE, "patch_size": 14, **kwargs})
