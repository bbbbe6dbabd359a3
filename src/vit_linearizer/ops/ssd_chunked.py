"""The Mamba-2 scan in chunks of batched matrix products, in plain PyTorch: any device, any length, forward and backward.

Source: the state-space-dual form of Mamba-2 (arXiv 2405.21060, section 6). Inside a chunk the recurrence of
``ssd_reference`` is a masked attention, between chunks one small state S is carried:

    y_i = sum_{j <= i} exp(a_i - a_j) (C_i . B_j) dt_j x_j  +  exp(a_i) C_i S  +  D x_i,      a_i = sum_{m <= i} dt_m A
    S'  = exp(a_Q) S + sum_j exp(a_Q - a_j) dt_j B_j x_j^T

One group is shared by all heads: ``C B^T``, ``B^T x`` and ``C S`` are computed once, never expanded to the heads.
It must equal ``ssd_reference`` on outputs and gradients.

Differentiating this form with autograd makes about twice the passes over the chunk matrices that its derivative needs,
so eager training goes through the hand-written `_ChunkedSSD`. Whoever records the program (TorchScript, ``torch.compile``,
export) sees `ssd_plain`, the forward alone: only tensor operators, and differentiable by them.

Shape suffixes: B batch, K chunks, Q positions in a chunk, H heads, P head dimension, N state dimension, M = B * K.
"""

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .recording import recording

#: Longest chunk. Work inside a chunk grows with its square, work between chunks falls with it.
MAX_CHUNK = 72

#: Up to so many chunks, a compiled program unrolls the loop over them.
_FEW_CHUNKS = 4

#: Chunks in a group where states are carried without a loop.
_GROUP = 8

#: Elements of one [B, K, H, Q, Q] temporary above which inference walks over groups of chunks: 4 MiB in fp32, so that
#: they stay in the cache.
_SEGMENT_ELEMENTS = 1 << 20


def choose_chunk(length: int, longest: int = MAX_CHUNK) -> int:
    """The chunk that cuts ``length`` into equal parts of at most ``longest``, padding each by less than one position."""
    chunks = (length + longest - 1) // longest
    return (length + chunks - 1) // chunks


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
    chunk = chunk_size or choose_chunk(x.shape[1])
    x_BKQHP, dt_BKQH, B_BKQN, C_BKQN = _cut(x, chunk), _cut(dt, chunk), _cut(B, chunk), _cut(C, chunk)
    arguments = (x_BKQHP, dt_BKQH, A, B_BKQN, C_BKQN, D)
    with _without_autocast(x.device):
        if recording():
            y_BKQHP = _forward(*arguments, at_once=x_BKQHP.shape[1] > _FEW_CHUNKS)[0]
        elif torch.is_grad_enabled() and any(t.requires_grad for t in arguments):
            y_BKQHP = _ChunkedSSD.apply(*arguments)
        else:
            y_BKQHP = _forward_in_segments(*arguments)
    return y_BKQHP.flatten(1, 2)[:, : x.shape[1]]


def ssd_plain(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, at_once: bool, longest: int = MAX_CHUNK
) -> Tensor:
    """`ssd_chunked` as a program to be recorded: TorchScript can compile it, export can trace it.

    Args:
        x: as in `ssd_chunked`, and the tensors after it.
        dt: as above.
        A: as above.
        B: as above.
        C: as above.
        D: as above.
        at_once: carry states without a loop over the chunks, so that the program holds for any length.
        longest: longest chunk; with ``at_once`` every chunk.
    """
    # A chunk that depended on a symbolic length would make every size below symbolic too.
    chunk = longest if at_once else choose_chunk(x.shape[1], longest)
    y_BKQHP = _forward(_cut(x, chunk), _cut(dt, chunk), A, _cut(B, chunk), _cut(C, chunk), D, None, False, at_once)[0]
    return F.pad(y_BKQHP.flatten(1, 2), [0, 0, 0, 0, 0, x.shape[1] - y_BKQHP.shape[1] * chunk])


def _cut(t: Tensor, chunk: int) -> Tensor:
    """``[batch, L, ...] -> [batch, chunks, chunk, ...]``, padded with zeros: they add nothing to a state."""
    length = t.shape[1]
    # Ceil-division, and no branch on the padding, leave no guard on the length where it is symbolic.
    chunks = (length + chunk - 1) // chunk
    padding = [0, 0] * (t.dim() - 2) + [0, chunks * chunk - length]
    return F.pad(t, padding).unflatten(1, [chunks, chunk])


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Dtypes are chosen here, not by autocast; the meta device, where FLOPs are counted, knows no autocast."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _causal_decay(a_BKHQ: Tensor) -> Tensor:
    """exp(a_i - a_j) for j <= i, 0 above the diagonal. The mask goes in before exp, which would overflow there."""
    size = a_BKHQ.shape[-1]
    future = torch.ones(size, size, dtype=torch.bool, device=a_BKHQ.device).triu(1)
    return (a_BKHQ[..., :, None] - a_BKHQ[..., None, :]).masked_fill_(future, -math.inf).exp_()


def _decays(dt_BKHQ: Tensor, A_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cumulated log decay a; decay from the chunk's start to i; decay from j to the chunk's end."""
    a_BKHQ = torch.cumsum(dt_BKHQ * A_H[:, None], dim=-1)
    return a_BKHQ, a_BKHQ.exp(), torch.exp(a_BKHQ[..., -1:] - a_BKHQ)


def _carry(local_BKNHP: Tensor, whole_BKH: Tensor, state_BNHP: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state entering each chunk, and the one after the last: S_{k+1} = whole_k S_k + local_k."""
    state = torch.zeros_like(local_BKNHP[:, 0]) if state_BNHP is None else state_BNHP
    entering: list[Tensor] = []
    for k in range(local_BKNHP.shape[1]):
        entering.append(state)
        state = torch.addcmul(local_BKNHP[:, k], state, whole_BKH[:, k, None, :, None])
    return torch.stack(entering, dim=1), state


def _carry_at_once(local_BKNHP: Tensor, log_whole_BKH: Tensor) -> Tensor:
    """The states entering each chunk as in `_carry`, without a loop: inside groups of chunks (J), then over groups (G).

    Two levels keep the work near linear for all lengths that matter: the second one's square counts groups of 576 positions.
    Nothing below branches on a size or a stride, so that a symbolic number of chunks stays free.
    """
    chunks, state_dim, _, head_dim = local_BKNHP.shape[1:]
    local_BHKc = _copy(local_BKNHP.permute(0, 3, 1, 2, 4)).flatten(3)
    log_whole_BHK = _copy(log_whole_BKH.transpose(1, 2))
    groups = (chunks + _GROUP - 1) // _GROUP
    padding = groups * _GROUP - chunks
    local_BHGJc = F.pad(local_BHKc, [0, 0, 0, padding]).unflatten(2, [groups, _GROUP])
    log_whole_BHGJ = F.pad(log_whole_BHK, [0, padding]).unflatten(2, [groups, _GROUP])
    within_BHGJc = _running_states(local_BHGJc, log_whole_BHGJ)
    after_BHGc = _running_states(_copy(within_BHGJc[..., -1, :]), log_whole_BHGJ.sum(-1))
    entering_BHGc = F.pad(after_BHGc, [0, 0, 1, -1])
    decay_BHGJ = torch.cumsum(log_whole_BHGJ, -1).exp()
    after_BHKc = (within_BHGJc + decay_BHGJ[..., None] * entering_BHGc[..., None, :]).flatten(2, 3)
    # Padding by less than nothing cuts off without asking whether there is as much to cut.
    entering_BHKc = F.pad(after_BHKc, [0, 0, 1, -1 - padding])
    return _copy(entering_BHKc.unflatten(3, [state_dim, head_dim]).permute(0, 2, 3, 1, 4))


def _running_states(local_XKc: Tensor, log_decay_XK: Tensor) -> Tensor:
    """The state after each step, S_k = exp(log_decay_k) S_{k-1} + local_k, as one matrix product; X is any batch."""
    steps = local_XKc.shape[-2]
    ones_KK = torch.ones(steps, steps, dtype=log_decay_XK.dtype, device=local_XKc.device)
    # log of the decay from j to k, summed over the steps between them alone: differences of long sums would lose digits.
    log_decay_XKK = torch.cumsum(ones_KK.tril(-1) * log_decay_XK[..., None], -2)
    decay_XKK = torch.where(ones_KK.triu(1) > 0, -math.inf, log_decay_XKK).exp()
    return torch.matmul(decay_XKK, local_XKc)


def _copy(t: Tensor) -> Tensor:
    """Contiguous outright: to ask whether it is already would be a guard on symbolic sizes."""
    return t.clone(memory_format=torch.contiguous_format)


def _forward(
    x_BKQHP: Tensor,
    dt_BKQH: Tensor,
    A_H: Tensor,
    B_BKQN: Tensor,
    C_BKQN: Tensor,
    D_H: Tensor,
    state_BNHP: Tensor | None = None,
    keep_state: bool = False,
    at_once: bool = False,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Outputs, the state after the last chunk (when kept), and what the backward reuses.

    With ``at_once`` neither a loop nor a branch depends on the number of chunks.
    """
    batch, chunks, size, heads, head_dim = x_BKQHP.shape
    work, exact = x_BKQHP.dtype, dt_BKQH.dtype
    B_MQN, C_MQN = B_BKQN.flatten(0, 1), C_BKQN.flatten(0, 1)
    dt_BKHQ = dt_BKQH.transpose(2, 3)
    a_BKHQ, from_start_BKHQ, to_end_BKHQ = _decays(dt_BKHQ, A_H)

    decay_BKHQQ = _causal_decay(a_BKHQ)
    gram_BKQQ = torch.bmm(C_MQN, B_MQN.transpose(1, 2)).unflatten(0, [batch, chunks])
    weights_BKHQQ = (decay_BKHQQ * (gram_BKQQ[:, :, None] * dt_BKHQ[..., None, :])).to(work)
    y_BKQHP = torch.matmul(weights_BKHQQ, x_BKQHP.transpose(2, 3)).transpose(2, 3)
    y_BKQHP = torch.addcmul(y_BKQHP, x_BKQHP, D_H[:, None].to(work))

    entering_BKNHP: Tensor | None = None
    last_BNHP: Tensor | None = None
    if at_once or chunks > 1 or keep_state or state_BNHP is not None:
        into_BKQH1 = (dt_BKHQ * to_end_BKHQ).transpose(2, 3).unsqueeze(-1).to(work)
        local_MNc = torch.bmm(B_MQN.transpose(1, 2), (x_BKQHP * into_BKQH1).reshape(batch * chunks, size, -1))
        local_BKNHP = local_MNc.to(exact).view(batch, chunks, -1, heads, head_dim)
        log_whole_BKH = a_BKHQ[..., -1]
        if at_once and not torch.jit.is_scripting():
            entering_BKNHP = _carry_at_once(local_BKNHP, log_whole_BKH)
        else:
            entering_BKNHP, last_BNHP = _carry(local_BKNHP, log_whole_BKH.exp(), state_BNHP)
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
            a_BKHQ, from_start_BKHQ, to_end_BKHQ = _decays(dt_BKHQ, A_H)
            whole_BKH = a_BKHQ[..., -1].exp()
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
