"""The Mamba-2 scan written as its recurrence: the truth every faster scan is compared with.

Source: Mamba-2 (arXiv 2405.21060), the layer behind eqs. 2-3 of ViT-Linearizer (arXiv 2504.00037). The paper's
equations leave out ``dt`` on the input and the skip ``D``; both stand here, as in Mamba-2 as published:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

Sequential and slow on purpose. It shares no code with the other forms.
"""

import torch
from torch import Tensor


def ssd_reference(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Run the recurrence one token at a time, from token 0 to token L - 1, from a zero state.

    Args:
        x: ``[batch, L, H, P]`` inputs of ``H`` heads with head dimension ``P``.
        dt: ``[batch, L, H]`` step sizes, already positive (after softplus).
        A: ``[H]`` negative decay rates.
        B: ``[batch, L, N]`` input projections, one group shared by all heads.
        C: ``[batch, L, N]`` output projections, one group shared by all heads.
        D: ``[H]`` skip weights.

    Returns:
        ``[batch, L, H, P]``.
    """
    dtype = x.dtype
    x, B, C = (t.to(torch.promote_types(t.dtype, dt.dtype)) for t in (x, B, C))
    batch, length, heads, head_dim = x.shape
    state = x.new_zeros(batch, heads, head_dim, B.shape[-1])
    outputs = []
    for t in range(length):
        decay = torch.exp(dt[:, t] * A)
        update = torch.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t], B[:, t])
        state = decay[:, :, None, None] * state + update
        outputs.append(torch.einsum("bhpn,bn->bhp", state, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1).to(dtype)
