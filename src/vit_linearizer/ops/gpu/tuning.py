"""What the Triton kernels share: how launches are tuned, and how a tensor is handed to them.

A launch is chosen by timing and kept in Triton's cache on disk. Some choices add in another order, so equal bits are for
equal choices: on another machine, or without that cache, the last digits may differ.

Triton's interpreter, in which kernels run on a CPU for tests, can neither time configurations nor multiply bf16.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Whether kernels are interpreted; Triton decides that when a kernel is decorated.
INTERPRETED = bool(triton.knobs.runtime.interpret)

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def autotune(configs: list[triton.Config], key: list[str]) -> Any:
    """``triton.autotune`` whose choices stay in Triton's cache on disk; interpreted, the first configuration is taken.

    Args:
        configs: launches to choose from.
        key: names of the kernel's arguments whose values ask for another choice; dtypes always do.
    """
    return triton.autotune(configs[:1] if INTERPRETED else configs, key=key, cache_results=True)


def bucket(tokens: int) -> int:
    """A class of problem sizes with one choice of launch: doubling the tokens makes another."""
    return tokens.bit_length()


def operand(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which products of matrices take their factors, for tensors of ``dtype``."""
    # The interpreter keeps bf16 as integers, and would multiply those.
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else _DTYPES[dtype]


def rows(t: Tensor) -> Tensor:
    """``t`` itself where its last dimension is dense, else a contiguous copy: kernels take any other stride."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
