"""A block of Adventurer over a long sequence, part by part: on a CPU, in evaluation, without gradients.

What lies between two linear layers stays in the cache, and nothing as long as the sequence is held but the sequence
itself. It must equal the block in one go (`AdventurerBlock.in_one_go`). Parts follow each other in reading order; the mixer
hands the state of its scan from one to the next.
"""

import collections
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops import silu_mul
from .last_token import in_proj_for_last
from .linear import prepared
from .mamba2 import Mamba2
from .parts import goes_in_parts, segments
from .swiglu import SwiGLU


def block_goes_in_parts(block: Any, x: Tensor) -> bool:
    """Whether the functions below may take ``[B, L, D]``, and pay."""
    known = type(block.mixer) is Mamba2 and type(block.mlp) is SwiGLU
    return goes_in_parts(block, x) and known and block.mixer.carries_states(x)


def block_in_parts(block: Any, x: Tensor) -> Tensor:
    """``[B, N + 1, D] -> [B, N + 1, D]``, class token last in both."""
    patches = x.shape[1] - 1
    tokens = x.shape[0] * x.shape[1]
    in_proj, out_proj = (prepared(layer, tokens) for layer in (block.mixer.in_proj, block.mixer.out_proj))
    mlp = _prepared_mlp(block.mlp, tokens)
    out = torch.empty_like(x)
    for (start, stop), mixed in _cores(block, x, in_proj):
        rows = slice(patches - stop, patches - start) if block.flip else slice(start, stop)
        mixed = out_proj(mixed)[:, int(start == 0) :]  # nothing is added to the heading average
        own = mixed[:, : stop - start]
        y = x[:, rows] + (own.flip(1) if block.flip else own)
        last = stop == patches
        if last:
            y = torch.cat([y, x[:, -1:] + mixed[:, -1:]], dim=1)
        y += mlp(block.norm_mlp(y))
        out[:, rows] = y[:, : stop - start]
        if last:
            out[:, -1:] = y[:, -1:]
    return out


def class_token_core_in_parts(block: Any, x: Tensor) -> Tensor:
    """``[B, N + 1, D] -> [B, 1, inner]``: what the mixer's core makes of the class token, which it reads last."""
    in_proj = in_proj_for_last(block.mixer, x)
    ((_, mixed),) = collections.deque(_cores(block, x, in_proj), maxlen=1)
    return mixed[:, -1:]


def _cores(block: Any, x: Tensor, in_proj: Callable[[Tensor], Tensor]) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Bounds of each part of the patches in reading order, and what the mixer's core makes of it.

    The heading average comes out with the first part, the class token with the last.
    """
    patches = x.shape[1] - 1
    total = sum(block.norm(x[:, start:stop]).sum(1, dtype=torch.float32) for start, stop in segments(x.shape[1]))
    heading = (total / x.shape[1]).to(x.dtype).unsqueeze(1)
    mixer = _MixerInParts(block.mixer, in_proj, x)
    for start, stop in segments(patches):
        u = block.norm(x[:, patches - stop : patches - start].flip(1) if block.flip else x[:, start:stop])
        tokens = [u]
        if start == 0:
            tokens.insert(0, heading)
        if stop == patches:
            tokens.append(block.norm(x[:, -1:]))
        yield (start, stop), mixer(torch.cat(tokens, dim=1))


class _MixerInParts:
    """A mixer up to its last linear layer, for the parts of one batch of sequences, first to last."""

    def __init__(self, mixer: Mamba2, in_proj: Callable[[Tensor], Tensor], like: Tensor):
        self.mixer = mixer
        self.in_proj = in_proj
        self.state = like.new_zeros((like.shape[0], mixer.num_heads, mixer.state_dim, mixer.head_dim), dtype=torch.float32)
        self.before = like[:, :0]  # tokens that the convolution looks back at

    def __call__(self, u: Tensor) -> Tensor:
        lead, seen = self.before.shape[1], self.mixer.conv1d.kernel_size[0] - 1
        u = torch.cat([self.before, u], dim=1)
        self.before = u[:, -seen:]
        return self.mixer.core(self.in_proj(u), self.state, lead)


def _prepared_mlp(mlp: SwiGLU, rows: int) -> Callable[[Tensor], Tensor]:
    """SwiGLU for so many rows in parts."""
    w1, w2, w3 = (prepared(layer, rows) for layer in (mlp.w1, mlp.w2, mlp.w3))
    return lambda x: w3(silu_mul(w1(x), w2(x)))
