"""The linear ViTs that timm knows by name: four on timm's own ViTs, and one on any timm ViT that is named.

Source: the sizes are timm's (those of arXiv 2106.10270). There are no published weights; a converted teacher
(`linear_vit.linearize`) saved to a folder says which base it was made of, and is rebuilt under the name ``linear_vit``.
"""

import sys
from typing import Any

import torch.nn as nn
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    list_models,
    model_entrypoint,
    register_model,
)
from timm.models._input import update_model_args
from torch import Tensor

from ..contracts import UserError, did_you_mean
from .linear_vit import GENERIC, replace_attention, without_weights

_BASES = {f"{GENERIC}_{size}_patch16_224": f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}
_ANY_BASE = "vit_base_patch16_224"


def _cfg(base: str) -> dict[str, Any]:
    """What timm says of a base (``NAME`` or ``NAME.TAG``), but for its weights.

    Raises:
        UserError: timm knows no such model, or no such tag of it.
    """
    name = base.partition(".")[0]
    if not is_model(name) or name.startswith(GENERIC):
        known = list_models("*vit*", exclude_filters=f"{GENERIC}*")
        raise UserError("base", base, f"is no timm ViT{did_you_mean(name, known)}")
    try:
        cfg = get_pretrained_cfg(base) or get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError("base", base, f"has no such tag; leave it out: {name}") from error
    return without_weights(cfg.to_dict()) if cfg is not None else {}


def _generic_cfg(name: str) -> dict[str, Any]:
    cfg = _cfg(name)
    cfg.pop("architecture")
    return cfg


default_cfgs = generate_default_cfgs({name: _generic_cfg(base) for name, base in {**_BASES, GENERIC: _ANY_BASE}.items()})


def _fit_checkpoint(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook between file and model: what the base's own does, which knows nothing of feature maps."""
    fit = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", lambda weights, _: weights)
    maps = {name: weight for name, weight in state_dict.items() if name.endswith((".attn.q_map", ".attn.k_map"))}
    rest = fit({name: weight for name, weight in state_dict.items() if name not in maps}, model)
    if getattr(model, "attn_pool", None) is None:  # another pooling was asked for
        rest = {name: weight for name, weight in rest.items() if not name.startswith("attn_pool.")}
    return {**rest, **maps}


def _create(
    variant: str, base: str, pretrained: bool, *, feature_map: str, keep_softmax_blocks: int, **kwargs: Any
) -> nn.Module:
    cfg = {**_cfg(base), "architecture": variant}

    def build(**model_args: Any) -> nn.Module:
        model = model_entrypoint(base.partition(".")[0])(pretrained=False, pretrained_cfg=cfg, **model_args)
        replace_attention(model, feature_map=feature_map, keep_softmax_blocks=keep_softmax_blocks)
        return model

    given = kwargs.pop("pretrained_cfg", None)
    model = build_model_with_cfg(
        build,
        variant,
        pretrained,
        pretrained_cfg=given or cfg,
        pretrained_filter_fn=_fit_checkpoint,
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **kwargs,
    )
    saved = {} if variant in _BASES else {"base": base}
    update_model_args(model, feature_map=feature_map, keep_softmax_blocks=keep_softmax_blocks, **saved)
    return model


@register_model
def linear_vit(
    pretrained: bool = False,
    base: str = _ANY_BASE,
    feature_map: str = "elu",
    keep_softmax_blocks: int = 0,
    **kwargs: Any,
) -> nn.Module:
    """Any timm ViT with linear attention.

    Args:
        pretrained: load weights, which a folder or file must bring.
        base: timm name of the ViT, with a tag or without, e.g. ``vit_base_patch16_clip_224.openai``; its normalisation is
            taken over, its weights are not.
        feature_map: see `ops.linear_attention.FeatureMap`.
        keep_softmax_blocks: so many last blocks keep softmax attention.
        **kwargs: of the base.

    Raises:
        UserError: unknown base or feature map, or a base that cannot be made linear.
    """
    options: dict[str, Any] = dict(feature_map=feature_map, keep_softmax_blocks=keep_softmax_blocks)
    return _create(GENERIC, base, pretrained, **options, **kwargs)


def _create_size(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    options: dict[str, Any] = {"feature_map": "elu", "keep_softmax_blocks": 0, **kwargs}
    return _create(variant, _BASES[variant], pretrained, **options)


@register_model
def linear_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-T/16 with linear attention, 5.7 M parameters."""
    return _create_size("linear_vit_tiny_patch16_224", pretrained, **kwargs)


@register_model
def linear_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-S/16 with linear attention, 22 M parameters."""
    return _create_size("linear_vit_small_patch16_224", pretrained, **kwargs)


@register_model
def linear_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-B/16 with linear attention, 87 M parameters."""
    return _create_size("linear_vit_base_patch16_224", pretrained, **kwargs)


@register_model
def linear_vit_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-L/16 with linear attention, 304 M parameters."""
    return _create_size("linear_vit_large_patch16_224", pretrained, **kwargs)
