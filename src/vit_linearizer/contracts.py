"""What crosses the packages: features of a backbone, the outcome of a loss, and the error shown to a user.

Every model becomes `Features` (models/adapters.py), every objective reads two of them, every task returns a `LossOutput`.
"""

import difflib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Features:
    """What any backbone says about a batch of images, free of scan order, prefix tokens and padding.

    Attributes:
        tokens: ``[B, N, D]`` patch tokens in raster order, no prefix tokens.
        grid: ``(H, W)`` with ``N = H * W``.
        class_token: ``[B, D]``, or None for a backbone without one.
        stages: the same, raw after the last block of each of the K stages; the last stage always ends at the last block.

    At the top level, tokens and class token come after the final norm; inside ``stages`` before it.
    """

    tokens: Tensor
    grid: tuple[int, int]
    class_token: Tensor | None = None
    stages: tuple["Features", ...] = ()

    @property
    def pooled(self) -> Tensor:
        """``[B, D]``: the mean patch token, the feature of every accuracy in this project."""
        return self.tokens.mean(dim=1)


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """A task's answer to one batch.

    Attributes:
        loss: scalar to differentiate, the weighted sum of the terms.
        terms: each term before its weight, detached, by name.
    """

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class UserError(Exception):
    """Something the user can mend: shown as one line naming the field, the value it got and the remedy (exit code 2)."""

    def __init__(self, name: str, value: object, remedy: str):
        super().__init__(f"{name} {value}: {remedy}" if value is not None else f"{name}: {remedy}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean A, B?' for names close to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(close)}?" if close else ""


def optional_import(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import a package that not every user has installed.

    Args:
        module: name of the module.
        extra: the optional dependency that brings it.
        purpose: the flag or feature that needs it.

    Raises:
        UserError: it is not installed; says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(purpose, None, f"needs {module}; pip install 'vit-linearizer[{extra}]'") from error
