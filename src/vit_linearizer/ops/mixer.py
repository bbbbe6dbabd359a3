"""The core of a Mamba-2 mixer: what stands between its two linear layers. Here is what goes into the scan.

    z, xBC, dt = zxbcdt        x, B, C = SiLU(conv(xBC))        dt = softplus(dt + dt_bias)        A = -exp(A_log)

Source: Mamba-2 (arXiv 2405.21060), with one group shared by all heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .causal_conv import causal_conv_silu


def scan_inputs(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    state_dim: int,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gate z ``[B, L, H * P]``, then x, dt, A, B, C as `ssd_reference` wants them; arguments as in `ops.mixer_core`."""
    heads = dt_bias.shape[0]
    inner = heads * head_dim
    z, xBC, dt = zxbcdt.split([inner, inner + 2 * state_dim, heads], dim=-1)
    xBC = causal_conv_silu(xBC, conv_weight, conv_bias)
    x, B, C = xBC.split([inner, state_dim, state_dim], dim=-1)
    # Step sizes and decays stay in fp32 (or better): they are exponentiated over the whole sequence.
    exact = torch.promote_types(dt.dtype, torch.float32)
    dt = F.softplus(dt.to(exact) + dt_bias.to(exact))
    A = -torch.exp(A_log.to(exact))
    return z, x.unflatten(-1, [heads, head_dim]), dt, A, B, C
