"""What several commands read from their flags: image sizes, ``name=value`` arguments of a model, and a model itself."""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn as nn
import tyro

from ..contracts import UserError
from ..models.loading import open_model


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model to work on.

    Attributes:
        model: run folder, timm name, hf-hub:OWNER/NAME, local-dir:FOLDER, or a weight file (with --model-arch).
        model_arch: timm name of the architecture, when the model is a weight file.
        model_args: arguments of the architecture, as name=value (e.g. flip=released).
        model_pretrained: load a timm name's pretrained weights.
    """

    model: tyro.conf.Positional[str]
    model_arch: str | None = None
    model_args: tuple[str, ...] = ()
    model_pretrained: bool = True

    def open(self, *, pretrained: bool = True, **model_args: Any) -> nn.Module:
        """The model in evaluation mode; ``model_args`` stand behind those of the user."""
        return open_model(
            self.model,
            field="model",
            architecture=self.model_arch,
            pretrained=pretrained and self.model_pretrained,
            **{**model_args, **parse_model_args("--model-args", self.model_args)},
        ).eval()


def parse_size(field: str, text: str | None) -> tuple[int, int] | None:
    """``224`` or ``512x1024`` (height x width) as (height, width); None stays None.

    Raises:
        UserError: anything else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match or "0" in (match[1], match[2]):
        raise UserError(field, text, "give one side (224) or height x width (512x1024)")
    return int(match[1]), int(match[2] or match[1])


def parse_model_args(field: str, pairs: Sequence[str]) -> dict[str, Any]:
    """``("depth=4", "flip=released")`` as ``{"depth": 4, "flip": "released"}``.

    Raises:
        UserError: a part without an equals sign.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name.isidentifier() and equals):
            raise UserError(field, pair, "must look like name=value, e.g. depth=4")
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value
    return values


def architectures_of(models: Sequence[str], architectures: Sequence[str]) -> dict[str, str]:
    """Architectures by weight file, from ``--models`` and ``--models-arch``, which names one for each file in their order.

    Raises:
        UserError: there are not as many of one as of the other.
    """
    files = [name for name in dict.fromkeys(models) if Path(name).is_file()]
    if architectures and len(architectures) != len(files):
        remedy = f"there are {len(files)} weight files among the models; name one architecture for each, in their order"
        raise UserError("--models-arch", " ".join(architectures), remedy)
    return dict(zip(files, architectures, strict=True)) if architectures else {}
