"""What the attention of chosen blocks is asked and what it answers, recorded while a ViT runs."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """One call of a block's attention module.

    Attributes:
        args: positional arguments; the first are the tokens, ``[B, N, D]``, prefix tokens included.
        kwargs: the others, e.g. ``rope``.
        output: ``[B, N, D]``, behind the output projection.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    def ask(self, attention: nn.Module) -> Tensor:
        """What another attention answers to the same call."""
        return attention(*self.args, **self.kwargs)


@contextmanager
def recorded_attention(model: nn.Module, blocks: Sequence[int]) -> Iterator[list[AttentionCall]]:
    """A list that holds one call for each of the blocks (0-based numbers, in their order) after the model has run once.

    Args:
        model: a timm ViT with ``blocks[number].attn``.
        blocks: which to record, first to last.
    """
    calls: list[AttentionCall] = []

    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        calls.append(AttentionCall(args=args, kwargs=kwargs, output=output))

    modules: Any = model.blocks
    with ExitStack() as hooks:
        for number in blocks:
            hooks.callback(modules[number].attn.register_forward_hook(record, with_kwargs=True).remove)
        yield calls
