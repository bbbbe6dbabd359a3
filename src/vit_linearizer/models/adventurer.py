"""Adventurer: a plain stack of Mamba-2 mixers and SwiGLUs over image patches, linear in the number of tokens.

Source: Adventurer (arXiv 2410.07599), the student of ViT-Linearizer (arXiv 2504.00037, table 7). Inside a block
(`adventurer_block`) tokens may be reversed and summarised; between blocks the stream is always [patches in raster order,
class token], and outside the model it is timm's [class token, patches]. Parameter names are those of the published
weights.
"""

from typing import Any, Literal

import torch
import torch.fx
import torch.nn as nn
from timm.layers import PatchEmbed, lecun_normal_, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args, update_model_input_size
from torch import Tensor

from ..ops import Implementation, exporting, resample_position_embedding
from .adventurer_block import FLIP_RULES, AdventurerBlock, Flip
from .mamba2 import Mamba2, RMSNorm
from .watching import is_watched


class Adventurer(nn.Module):
    """Adventurer as a timm model.

    Args:
        img_size: nominal image size, an int or (height, width); position embeddings are made for it.
        patch_size: side of a patch.
        num_classes: outputs of the head; 0 for none.
        global_pool: what the head reads: ``token`` (the class token), ``avg`` (mean patch token) or '' (all tokens).
        embed_dim: width, a multiple of 32.
        depth: number of blocks.
        mlp_ratio: SwiGLU hidden width over ``embed_dim``.
        drop_rate: dropout before the head.
        drop_path_rate: drop path of the last block; it rises linearly from 0 at the first.
        flip: rule of `FLIP_RULES`.
        dynamic_img_size: accept any image size that is a multiple of the patch, resampling the position embedding.
        implementation: which scan runs, see `ops.ssd`.

    Raises:
        ValueError: unknown flip rule or pooling, or a width that does not fit the heads.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["token", "avg", ""] = "token",
        embed_dim: int = 768,
        depth: int = 12,
        mlp_ratio: float = 2.5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        flip: Flip = "alternate",
        dynamic_img_size: bool = True,
        implementation: Implementation = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if flip not in FLIP_RULES:
            raise ValueError(f"flip={flip!r}: choose from {', '.join(FLIP_RULES)}")
        _check_pool(global_pool)
        self.num_classes = num_classes
        self.flip = flip
        self.global_pool = global_pool
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.has_class_token = True
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, strict_img_size=not dynamic_img_size, **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches + 1, embed_dim, **dd))
        self.layers = nn.ModuleList(
            AdventurerBlock(
                embed_dim,
                depth=depth,
                flip=FLIP_RULES[flip](n),
                mlp_ratio=mlp_ratio,
                drop_path=drop_path_rate * n / max(1, depth - 1),
                implementation=implementation,
                **dd,
            )
            for n in range(depth)
        )
        self.norm_f = RMSNorm(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        reduction = patch_size if isinstance(patch_size, int) else max(patch_size)
        self.feature_info = [dict(module=f"layers.{n}", num_chs=embed_dim, reduction=reduction) for n in range(depth)]
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Truncated normal 0.02 for positions, class token and head, LeCun normal for the patches, zero biases.

        Args:
            needs_reset: initialise the parts too that do it themselves when built, e.g. after ``to_empty``.
        """
        if needs_reset:
            for module in self.modules():
                if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | RMSNorm):
                    module.reset_parameters()
            for block in self.layers:
                block.mixer.init_weights()  # type: ignore[union-attr, operator]  # blocks have a mixer
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        lecun_normal_(self.patch_embed.proj.weight)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)

    def embed(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W] -> [B, N + 1, D]``: patches in raster order, class token last, positions added."""
        grid = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        patches = self.patch_embed(x)
        tokens = torch.cat([patches, self.cls_token.expand(patches.shape[0], -1, -1)], dim=1)
        return tokens + resample_position_embedding(self.pos_embed, self.patch_embed.grid_size, grid)

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W] -> [B, 1 + N, D]``: class token, then patches in raster order, after the final norm."""
        x = self.embed(x)
        for block in self.layers:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return _class_first(self.norm_f(x))

    @torch.jit.unused
    def forward_class_token(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W] -> [B, 1, D]``: the class token of `forward_features`, without the last block's patches."""
        x = self.embed(x)
        for n, block in enumerate(self.layers, start=1):
            arguments = (x, True) if n == len(self.layers) else (x,)
            x = checkpoint(block, *arguments) if self.grad_checkpointing else block(*arguments)
        return self.norm_f(x)

    @torch.jit.unused
    def _reads_class_token_alone(self, x: Tensor) -> bool:
        """Whether `forward_class_token` is all that `forward` needs, and nobody looks at the rest on its way."""
        last = self.layers[-1]
        return (
            self.global_pool == "token"
            and type(last) is AdventurerBlock  # not one that somebody wrapped or put in its place
            and type(last.mixer) is Mamba2
            and not isinstance(x, torch.fx.Proxy)
            and not exporting()
            and not is_watched(last)
            and not is_watched(self.norm_f)
        )

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify the output of `forward_features`."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, 1:].mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self._reads_class_token_alone(x):
            return self.forward_head(self.forward_class_token(x))
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Any]:
        """timm's `forward_intermediates`: outputs of chosen blocks, and the final features.

        Args:
            x: ``[B, in_chans, H, W]``.
            indices: the last n blocks if an int, all if None, else the blocks named.
            return_prefix_tokens: give each intermediate as (patches, class token); not in TorchScript.
            norm: put each intermediate through the final norm.
            stop_early: do not run blocks behind the last one named.
            output_fmt: ``NCHW`` maps or ``NLC`` tokens.
            intermediates_only: leave out the final features.
            output_dict: return a dictionary.

        Returns:
            The intermediates, or (final features as of `forward_features`, intermediates), or both in a dictionary as
            ``image_features``, ``image_intermediates`` and ``image_intermediates_prefix`` (class tokens, where asked for).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt}: choose NCHW or NLC")
        taken, last = feature_take_indices(len(self.layers), indices)
        height, width = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        x = self.embed(x)
        intermediates: list[Tensor] = []
        prefix: list[Tensor] = []
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice modules
            layers = self.layers
        else:
            layers = self.layers[: last + 1]
        for n, block in enumerate(layers):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            if n in taken:
                y = self.norm_f(x) if norm else x
                patches = y[:, :-1]
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, [height, width]).contiguous()
                intermediates.append(patches)
                prefix.append(y[:, -1:])
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": intermediates}
            if return_prefix_tokens:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = _class_first(self.norm_f(x))
            return result
        if not torch.jit.is_scripting() and return_prefix_tokens:
            intermediates = list(zip(intermediates, prefix, strict=True))  # type: ignore[arg-type]
        if intermediates_only:
            return intermediates
        return _class_first(self.norm_f(x)), intermediates

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] | tuple[int, ...] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """DINO's interface to `forward_intermediates`: the last ``n`` blocks or those named, ``reshape`` for maps."""
        return self.forward_intermediates(  # type: ignore[return-value]  # a list, as intermediates alone are asked for
            x,
            indices=n if isinstance(n, int) else list(n),
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay; timm's groups leave out norms and biases by their dimension."""
        scan = {n for n, _ in self.named_parameters() if n.endswith((".A_log", ".D", ".dt_bias"))}
        return {"pos_embed", "cls_token"} | scan

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning-rate decay."""
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one."""
        if global_pool is not None:
            _check_pool(global_pool)
            self.global_pool = global_pool  # type: ignore[assignment]  # checked above
        self.num_classes = num_classes
        like = self.cls_token
        self.head = nn.Identity().train(self.training)
        if num_classes > 0:
            self.head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype).train(self.training)
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop blocks behind the last one wanted, and the norm and head when asked."""
        taken, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]  # a new list, which starts in training mode
        self.layers.training = self.training
        update_model_args(self, depth=len(self.layers))
        if prune_norm:
            self.norm_f = nn.Identity().train(self.training)  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Change the nominal image size or the patch size, resampling patch and position embedding."""
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        resampled = resample_position_embedding(self.pos_embed.detach(), old_grid, self.patch_embed.grid_size)
        self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)


def _class_first(x: Tensor) -> Tensor:
    return torch.cat([x[:, -1:], x[:, :-1]], dim=1)


def _check_pool(global_pool: str) -> None:
    if global_pool not in ("token", "avg", ""):
        raise ValueError(f"global_pool={global_pool!r}: choose from token, avg or '' (all tokens)")
