"""The Mamba-2 scan in chunks of batched matrix products, in plain PyTorch: any device, any length, forward and backward.

Source: the state-space-dual form of Mamba-2 (arXiv 2405.21060, section 6). Inside a chunk the recurrence of
``ssd_reference`` is a masked attention, between chunks one small state S is carried:

    y_i = sum_{j <= i} exp(a_i - a_j) (C_i . B_j) dt_j x_j  +  exp(a_i) C_i S  +  D x_i,      a_i = sum_{m <= i} dt_m A
    S'  = exp(a_Q) S + sum_j exp(a_Q - a_j) dt_j B_j x_j^T

One group is shared by all heads: ``C B^T``, ``B^T x`` and ``C S`` are computed once, never expanded to the heads.
It must equal ``ssd_reference`` on outputs and gradients.

Differentiating this form with autograd makes about twice the passes over the chunk matrices that its derivative needs,
so eager training goes through the hand-written `_ChunkedSSD`; tracing (``torch.compile``, export) sees the forward alone.

Shape suffixes: B batch, K chunks, Q positions in a chunk, H heads, P head dimension, N state dimension, M = B * K.
"""

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Longest chunk. Work inside a chunk grows with its square, work between chunks falls with it.
MAX_CHUNK = 72

#: Elements of one [B, K, H, Q, Q] temporary above which inference walks over groups of chunks: 4 MiB in fp32, so that
#: they stay in the cache.
_SEGMENT_ELEMENTS = 1 << 20


def choose_chunk(length: int, longest: int = MAX_CHUNK) -> int:
    """The chunk that cuts ``length`` into equal parts of at most ``longest``, padding each by less than one position."""
    return math.ceil(length / max(1, math.ceil(length / longest)))


def ssd_chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, chunk_size: int | None = None
) -> Tensor:
    """Chunked form of `ssd_reference`; the same arguments and result.

    Args:
        x: ``[batch, L, H, P]``; its dtype is the dtype of the matrix products and of the result.
        dt: ``[batch, L, H]``, positive; its dtype (fp32, or fp64 for tests) carries decays and states.
        A: ``[H]`` negative.
        B: ``[batch, L, N]``.
        C: ``[batch, L, N]``.
        D: ``[H]``.
        chunk_size: positions in a chunk; by default `choose_chunk` of the length.

    Returns:
        ``[batch, L, H, P]`` in the dtype of ``x``.
    """
    length = x.shape[1]
    chunk = chunk_size or choose_chunk(length)
    padding = math.ceil(length / chunk) * chunk - length
    chunks = [F.pad(t, (0, 0) * (t.ndim - 2) + (0, padding)).unflatten(1, (-1, chunk)) for t in (x, dt, B, C)]
    x_BKQHP, dt_BKQH, B_BKQN, C_BKQN = chunks
    arguments = (x_BKQHP, dt_BKQH, A, B_BKQN, C_BKQN, D)
    with _without_autocast(x.device):
        if torch.compiler.is_compiling():
            y_BKQHP = _forward(*arguments)[0]
        elif torch.is_grad_enabled() and any(t.requires_grad for t in arguments):
            y_BKQHP = _ChunkedSSD.apply(*arguments)
        else:
            y_BKQHP = _forward_in_segments(*arguments)
    y = y_BKQHP.flatten(1, 2)
    return y[:, :length] if padding else y


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Dtypes are chosen here, not by autocast; the meta device, where FLOPs are counted, knows no autocast."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _causal_decay(a_BKHQ: Tensor) -> Tensor:
    """exp(a_i - a_j) for j <= i, 0 above the diagonal. The mask goes in before exp, which would overflow there."""
    size = a_BKHQ.shape[-1]
    future = torch.ones(size, size, dtype=torch.bool, device=a_BKHQ.device).triu(1)
    return (a_BKHQ[..., :, None] - a_BKHQ[..., None, :]).masked_fill_(future, -math.inf).exp_()


def _decays(dt_BKHQ: Tensor, A_H: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cumulated log decay a; decay from the chunk's start to i; dt and decay from j to the chunk's end; whole chunk."""
    a_BKHQ = torch.cumsum(dt_BKHQ * A_H[:, None], dim=-1)
    return a_BKHQ, a_BKHQ.exp(), torch.exp(a_BKHQ[..., -1:] - a_BKHQ), torch.exp(a_BKHQ[..., -1])


def _carry(local_BKNHP: Tensor, whole_BKH: Tensor, state_BNHP: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state entering each chunk, and the one after the last: S_{k+1} = whole_k S_k + local_k."""
    state = torch.zeros_like(local_BKNHP[:, 0]) if state_BNHP is None else state_BNHP
    entering = []
    for k in range(local_BKNHP.shape[1]):
        entering.append(state)
        state = torch.addcmul(local_BKNHP[:, k], state, whole_BKH[:, k, None, :, None])
    return torch.stack(entering, dim=1), state


def _forward(
    x_BKQHP: Tensor,
    dt_BKQH: Tensor,
    A_H: Tensor,
    B_BKQN: Tensor,
    C_BKQN: Tensor,
    D_H: Tensor,
    state_BNHP: Tensor | None = None,
    keep_state: bool = False,
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """Outputs, the state after the last chunk (when kept), and what the backward reuses."""
    batch, chunks, size, heads, head_dim = x_BKQHP.shape
    work, exact = x_BKQHP.dtype, dt_BKQH.dtype
    B_MQN, C_MQN = B_BKQN.flatten(0, 1), C_BKQN.flatten(0, 1)
    dt_BKHQ = dt_BKQH.transpose(2, 3)
    a_BKHQ, from_start_BKHQ, to_end_BKHQ, whole_BKH = _decays(dt_BKHQ, A_H)

    decay_BKHQQ = _causal_decay(a_BKHQ)
    gram_BKQQ = torch.bmm(C_MQN, B_MQN.transpose(1, 2)).unflatten(0, (batch, chunks))
    weights_BKHQQ = (decay_BKHQQ * (gram_BKQQ[:, :, None] * dt_BKHQ[..., None, :])).to(work)
    y_BKQHP = torch.matmul(weights_BKHQQ, x_BKQHP.transpose(2, 3)).transpose(2, 3)
    y_BKQHP = torch.addcmul(y_BKQHP, x_BKQHP, D_H[:, None].to(work))

    entering_BKNHP = last_BNHP = None
    if chunks > 1 or keep_state or state_BNHP is not None:
        into_BKQH1 = (dt_BKHQ * to_end_BKHQ).transpose(2, 3).unsqueeze(-1).to(work)
        local_MNc = torch.bmm(B_MQN.transpose(1, 2), (x_BKQHP * into_BKQH1).reshape(batch * chunks, size, -1))
        local_BKNHP = local_MNc.to(exact).view(batch, chunks, -1, heads, head_dim)
        entering_BKNHP, last_BNHP = _carry(local_BKNHP, whole_BKH, state_BNHP)
        carried_MQc = torch.bmm(C_MQN, entering_BKNHP.to(work).reshape(batch * chunks, -1, heads * head_dim))
        out_of_BKQH1 = from_start_BKHQ.transpose(2, 3).unsqueeze(-1).to(work)
        y_BKQHP = torch.addcmul(y_BKQHP, carried_MQc.view_as(x_BKQHP), out_of_BKQH1)
    return y_BKQHP, last_BNHP, (decay_BKHQQ, gram_BKQQ, weights_BKHQQ, entering_BKNHP)


def _forward_in_segments(
    x_BKQHP: Tensor, dt_BKQH: Tensor, A_H: Tensor, B_BKQN: Tensor, C_BKQN: Tensor, D_H: Tensor
) -> Tensor:
    """`_forward` over groups of chunks that keep its temporaries small; the state goes from group to group."""
    batch, chunks, size, heads, _ = x_BKQHP.shape
    step = max(1, _SEGMENT_ELEMENTS // (batch * heads * size * size))
    outputs, state = [], None
    for k in range(0, chunks, step):
        part = slice(k, k + step)
        more = k + step < chunks
        y, state, _ = _forward(
            x_BKQHP[:, part], dt_BKQH[:, part], A_H, B_BKQN[:, part], C_BKQN[:, part], D_H, state, keep_state=more
        )
        outputs.append(y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


class _ChunkedSSD(torch.autograd.Function):
    """`_forward` with its derivative written out: every L x L quantity is passed over once."""

    @staticmethod
    def forward(
        ctx: Any, x_BKQHP: Tensor, dt_BKQH: Tensor, A_H: Tensor, B_BKQN: Tensor, C_BKQN: Tensor, D_H: Tensor
    ) -> Tensor:
        y_BKQHP, _, kept = _forward(x_BKQHP, dt_BKQH, A_H, B_BKQN, C_BKQN, D_H)
        ctx.save_for_backward(x_BKQHP, dt_BKQH, A_H, B_BKQN, C_BKQN, D_H, *kept)
        return y_BKQHP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (dy_BKQHP,) = gradients
        x_BKQHP, dt_BKQH, A_H, B_BKQN, C_BKQN, D_H, decay_BKHQQ, gram_BKQQ, weights_BKHQQ, entering_BKNHP = ctx.saved_tensors
        batch, chunks, size, heads, head_dim = x_BKQHP.shape
        work, exact = x_BKQHP.dtype, dt_BKQH.dtype
        dy_BKQHP = dy_BKQHP.to(work)
        B_MQN, C_MQN = B_BKQN.flatten(0, 1), C_BKQN.flatten(0, 1)
        dt_BKHQ = dt_BKQH.transpose(2, 3)

        # Skip.
        dD_H = (dy_BKQHP * x_BKQHP).sum((0, 1, 2, 4), dtype=exact)
        dx_BKQHP = dy_BKQHP * D_H[:, None].to(work)

        # Inside the chunks: y = W x with W_ij = decay_ij gram_ij dt_j.
        dy_BKHQP, x_BKHQP = dy_BKQHP.transpose(2, 3).contiguous(), x_BKQHP.transpose(2, 3)
        dx_BKQHP += torch.matmul(weights_BKHQQ.transpose(3, 4), dy_BKHQP).transpose(2, 3)
        dW_BKHQQ = torch.matmul(dy_BKHQP, x_BKHQP.transpose(3, 4)).to(exact).mul_(decay_BKHQQ)
        dgram_MQQ = (dW_BKHQQ * dt_BKHQ[..., None, :]).sum(2).flatten(0, 1).to(work)
        dC_MQN = torch.bmm(dgram_MQQ, B_MQN)
        dB_MQN = torch.bmm(dgram_MQQ.transpose(1, 2), C_MQN)
        dW_BKHQQ = dW_BKHQQ.mul_(gram_BKQQ[:, :, None])
        ddt_BKHQ = dW_BKHQQ.sum(3)
        # a_i raises row i of W and lowers column i.
        da_BKHQ = torch.matmul(dW_BKHQQ, dt_BKHQ.unsqueeze(-1)).squeeze(-1) - ddt_BKHQ * dt_BKHQ

        # Between the chunks.
        if entering_BKNHP is not None:
            _, from_start_BKHQ, to_end_BKHQ, whole_BKH = _decays(dt_BKHQ, A_H)
            out_of_BKQH1 = from_start_BKHQ.transpose(2, 3).unsqueeze(-1).to(work)
            into_BKHQ = dt_BKHQ * to_end_BKHQ
            into_BKQH1 = into_BKHQ.transpose(2, 3).unsqueeze(-1).to(work)
            states_MNc = entering_BKNHP.to(work).reshape(batch * chunks, -1, heads * head_dim)
            scaled_MQc = (dy_BKQHP * out_of_BKQH1).reshape(batch * chunks, size, -1)
            dC_MQN += torch.bmm(scaled_MQc, states_MNc.transpose(1, 2))
            carried = torch.bmm(C_MQN, states_MNc).view_as(x_BKQHP) * scaled_MQc.view_as(x_BKQHP)
            da_BKHQ += carried.sum(-1, dtype=exact).transpose(2, 3)

            # The state's gradient runs from the last chunk to the first: R_k = C^T dy + whole R_{k+1}.
            dlocal_BKNHP = torch.bmm(C_MQN.transpose(1, 2), scaled_MQc).to(exact).view_as(entering_BKNHP)
            reverse, _ = _carry(dlocal_BKNHP.flip(1), whole_BKH.flip(1), None)
            dstate_BKNHP = reverse.flip(1)
            dwhole_BKH = (entering_BKNHP * dstate_BKNHP).sum((2, 4)) * whole_BKH
            dstates_MNc = dstate_BKNHP.to(work).reshape(batch * chunks, -1, heads * head_dim)
            dinput_BKQHP = torch.bmm(B_MQN, dstates_MNc).view_as(x_BKQHP)
            dB_MQN += torch.bmm((x_BKQHP * into_BKQH1).reshape(batch * chunks, size, -1), dstates_MNc.transpose(1, 2))
            dinto_BKHQ = (dinput_BKQHP * x_BKQHP).sum(-1, dtype=exact).transpose(2, 3)
            dx_BKQHP += dinput_BKQHP * into_BKQH1
            ddt_BKHQ += dinto_BKHQ * to_end_BKHQ
            dinto_BKHQ = dinto_BKHQ * into_BKHQ
            da_BKHQ -= dinto_BKHQ
            da_BKHQ[..., -1] += dinto_BKHQ.sum(-1) + dwhole_BKH

        # a is the running sum of dt A.
        dlog_BKHQ = da_BKHQ.flip(-1).cumsum(-1).flip(-1)
        ddt_BKHQ = torch.addcmul(ddt_BKHQ, dlog_BKHQ, A_H[:, None])
        dA_H = (dlog_BKHQ * dt_BKHQ).sum((0, 1, 3))
        dB_BKQN, dC_BKQN = (t.unflatten(0, (batch, chunks)) for t in (dB_MQN, dC_MQN))
        return dx_BKQHP, ddt_BKHQ.transpose(2, 3), dA_H, dB_BKQN, dC_BKQN, dD_H
