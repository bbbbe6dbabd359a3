"""From any timm ViT to the same model with linear attention, weights kept.

Source: ViT-AdaLA (arXiv 2603.16063): softmax attention is replaced in every block; nothing else changes. The result is an
instance of the class that it came from, with parameters of the same names, so all that timm does with that class goes on
working. Keeping softmax in the last blocks is not the paper's (a choice, for the hybrids of later work). With all blocks
kept it must equal the original exactly. An attention pooling (SigLIP) reads all tokens with one query, which is linear
already, and stays.
"""

import copy
from typing import Any

import torch.nn as nn
from timm.models import list_pretrained
from timm.models._input import update_model_args

from ..contracts import UserError
from ..ops.linear_attention import check_feature_map
from .linear_attention import KNOWN, LinearAttention
from .mlp_in_parts import let_mlp_go_in_parts

#: The timm name under which a converted model is rebuilt (`linear_vit_sizes`).
GENERIC = "linear_vit"


def linearize(model: nn.Module, *, feature_map: str = "elu", keep_softmax_blocks: int = 0) -> nn.Module:
    """A copy of a timm ViT with linear attention; the model given stays as it is.

    Saved with `loading.save_model_folder`, the copy is rebuilt by ``timm.create_model("local-dir:FOLDER", pretrained=True)``
    wherever this package is imported.

    Args:
        model: a timm ViT (``vit_*``, ``deit3_*``, CLIP, DINOv2, SigLIP, EVA, DINOv3, ...), from ``timm.create_model``.
        feature_map: see `ops.linear_attention.FeatureMap`.
        keep_softmax_blocks: so many last blocks stay as they are.

    Returns:
        A model of the same class, on the same device, with the same weights.

    Raises:
        UserError: unknown feature map, more blocks kept than there are, or attention that is not known.
    """
    linear: Any = copy.deepcopy(model)
    replace_attention(linear, feature_map=feature_map, keep_softmax_blocks=keep_softmax_blocks)
    cfg = getattr(linear, "pretrained_cfg", None)
    if cfg:
        base = ".".join(part for part in (cfg["architecture"], _known_tag(cfg)) if part)
        linear.pretrained_cfg = linear.default_cfg = {**without_weights(cfg), "architecture": GENERIC}
        update_model_args(linear, base=base, feature_map=feature_map, keep_softmax_blocks=keep_softmax_blocks)
    return linear


def _known_tag(cfg: dict[str, Any]) -> str | None:
    """The tag of a model's weights where timm knows it; a folder may bring one of its own."""
    tag = cfg.get("tag") or ""
    known = (name.partition(".")[2] for name in list_pretrained(f"{cfg['architecture']}.*"))
    return tag if tag in known else None


def linear_blocks(model: nn.Module) -> list[tuple[int, LinearAttention]]:
    """The 0-based numbers of the blocks with linear attention, and their attention modules, first block first."""
    blocks: Any = getattr(model, "blocks", ())
    attentions = [(number, getattr(block, "attn", None)) for number, block in enumerate(blocks)]
    return [(number, attention) for number, attention in attentions if isinstance(attention, LinearAttention)]


def replace_attention(model: nn.Module, *, feature_map: str, keep_softmax_blocks: int) -> None:
    """Put linear attention into a ViT itself; all checks come before the first change.

    Args:
        model: as in `linearize`.
        feature_map: as there.
        keep_softmax_blocks: as there.

    Raises:
        UserError: as there.
    """
    check_feature_map(feature_map)
    blocks = list(getattr(model, "blocks", ()))
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
    if not blocks:
        raise UserError("model", name, f"{type(model).__name__} has no blocks of attention; use a ViT")
    if not 0 <= keep_softmax_blocks <= len(blocks):
        remedy = f"must be between 0 and the model's {len(blocks)} blocks"
        raise UserError("keep_softmax_blocks", keep_softmax_blocks, remedy)
    for number, block in enumerate(blocks):
        attention = getattr(block, "attn", None)
        if type(attention) not in KNOWN:
            there = type(block if attention is None else attention)
            remedy = "is linear already" if there is LinearAttention else "cannot be made linear; use another ViT"
            raise UserError("model", name, f"{there.__module__}.{there.__qualname__} of block {number} {remedy}")
    for block in blocks[: len(blocks) - keep_softmax_blocks]:
        block.attn = LinearAttention(block.attn, feature_map)
        let_mlp_go_in_parts(block.mlp)


def without_weights(cfg: dict[str, Any]) -> dict[str, Any]:
    """A ``pretrained_cfg`` (timm's) of an architecture: normalisation and sizes, but no weights to be fetched."""
    weights = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "tag", "custom_load")
    return {name: value for name, value in cfg.items() if name not in weights}
