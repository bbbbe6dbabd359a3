"""What several commands read from their flags: image sizes, and ``name=value`` arguments of a model."""

import ast
import re
from collections.abc import Sequence
from typing import Any

from ..contracts import UserError


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
