"""The Mamba-2 mixer, with one group shared by all heads.

Source: Mamba-2 (arXiv 2405.21060); ViT-Linearizer's eqs. 2-3 are a simplification of it. Parameter names are those of
the published Adventurer weights. It must equal ``transformers``' Mamba-2 with the same weights.
"""

import math

import torch
import torch.nn as nn
from torch import Tensor

from ..ops import Implementation, mixer_carries_states, mixer_core, rms_norm
from .last_token import in_proj_for_last
from .linear import Linear


class RMSNorm(nn.Module):
    """`ops.rms_norm` with its weight, optionally gated."""

    def __init__(self, dim: int, eps: float = 1e-5, *, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.weight, self.eps, gate)


class Mamba2(nn.Module):
    """Mamba-2 mixer over a sequence, first token to last.

    Args:
        dim: width of the sequence; ``expand * dim`` must be a multiple of ``head_dim``.
        state_dim: size of the state per channel.
        head_dim: channels that share one decay.
        expand: inner width over ``dim``.
        conv_width: tokens that the causal convolution sees.
        out_scale: factor on the initial ``out_proj`` (Adventurer: one over the square root of the depth).
        implementation: which scan runs, see `ops.ssd`.

    Raises:
        ValueError: the inner width is not a multiple of ``head_dim``.
    """

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int = 64,
        head_dim: int = 64,
        expand: int = 2,
        conv_width: int = 4,
        out_scale: float = 1.0,
        implementation: Implementation = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.inner_dim = expand * dim
        self.state_dim = state_dim
        self.head_dim = head_dim
        self.out_scale = out_scale
        self.implementation: str = implementation
        if self.inner_dim % head_dim:
            raise ValueError(f"inner width {self.inner_dim} (expand {expand} x dim {dim}) must be a multiple of {head_dim}")
        self.num_heads = self.inner_dim // head_dim
        conv_dim = self.inner_dim + 2 * state_dim
        self.in_proj = Linear(dim, self.inner_dim + conv_dim + self.num_heads, bias=False, **dd)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, conv_width, groups=conv_dim, padding=conv_width - 1, **dd)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads, **dd))
        self.A_log = nn.Parameter(torch.empty(self.num_heads, **dd))
        self.D = nn.Parameter(torch.empty(self.num_heads, **dd))
        self.norm = RMSNorm(self.inner_dim, **dd)
        self.out_proj = Linear(self.inner_dim, dim, bias=False, **dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """dt log-uniform in [1e-3, 1e-1] through the inverse softplus, A uniform in [1, 16], D one, scaled ``out_proj``."""
        with torch.no_grad():
            dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            self.A_log.uniform_(1, 16).log_()
            self.D.fill_(1.0)
            nn.init.zeros_(self.conv1d.bias)  # type: ignore[arg-type]  # the convolution has a bias
            nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
            self.out_proj.weight.mul_(self.out_scale)

    def forward(self, u: Tensor, last_alone: bool = False) -> Tensor:
        """``[B, L, dim] -> [B, L, dim]``, or ``[B, 1, dim]`` of the last token; output t depends on inputs 0..t only."""
        if torch.jit.is_scripting() or not last_alone:
            return self.out_proj(self.core(self.in_proj(u)))
        return self.out_proj(self.core(in_proj_for_last(self, u)(u))[:, -1:])

    def core(self, zxbcdt: Tensor, state: Tensor | None = None, lead: int = 0) -> Tensor:
        """All between the two linear layers; see `ops.mixer_core`."""
        return mixer_core(
            zxbcdt,
            self.conv1d.weight,
            self.conv1d.bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.norm.weight,
            self.norm.eps,
            self.state_dim,
            self.head_dim,
            self.implementation,
            state,
            lead,
        )

    @torch.jit.ignore
    def carries_states(self, u: Tensor) -> bool:
        """Whether `core` can take a sequence like this in parts."""
        return mixer_carries_states(
            u, self.conv1d.weight, self.conv1d.bias, self.state_dim, self.head_dim, self.implementation
        )
