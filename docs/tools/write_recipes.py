"""Write the tables of docs/recipes.md from the recipes themselves: no value on that page is typed by hand.

    python docs/tools/write_recipes.py

A table stands between ``<!-- recipes: NAME -->`` and ``<!-- end -->``. Its rows are values by their names, its columns the
recipes; a value that a command has a flag for stands under the flag's name. What none of them has, uses or has above 0 is
left out.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vit_linearizer.commands.distill_flags import DistillConfig
from vit_linearizer.commands.finetune import FinetuneConfig
from vit_linearizer.commands.segment import SegmentConfig
from vit_linearizer.recipes import ADAPTATION, DISTILLATION, FINE_TUNING, SEGMENTATION

PAGE = Path(__file__).resolve().parents[1] / "recipes.md"
_BLOCK = re.compile(r"(<!-- recipes: ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)

#: Values that begin so mean something only where another one is above 0.
_USED_WITH = {
    "masking": "mask_ratio",
    **{name: f"{name}_weight" for name in ("activation_matching", "masked_prediction", "feature_regression")},
}

#: What a recipe of distillation or fine-tuning is asked for: a size that has a column of its own in the paper.
_BASE, _LARGE = "adventurer_base_patch16_224", "adventurer_large_patch16_224"


def main() -> None:
    """Bring the page up to date."""
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def with_tables(page: str) -> str:
    """The page with its tables written anew."""
    written = tables()
    return _BLOCK.sub(lambda block: f"{block[1]}\n{written[block[2]]}\n{block[3]}", page)


def tables() -> dict[str, str]:
    """The tables as Markdown, by name."""
    distillation = {}
    for name, recipe in _shown(DISTILLATION):
        base, large = recipe(_BASE).flat(), recipe(_LARGE).flat()
        distillation |= {name: base} if base == large else {name: base, f"{name}, large": large}
    adaptation, shared = {}, {}
    for name, recipe in ADAPTATION.items():
        both = recipe(_BASE)
        adaptation |= {f"{name}, stage 1": both.attention.flat(), f"{name}, stage 2": both.feature.flat()}
        own = [field.name for field in dataclasses.fields(both) if field.name not in ("attention", "feature")]
        shared[name] = {field: getattr(both, field) for field in own}
    return {
        "distillation": _table(distillation, DistillConfig),
        "adaptation": _table(adaptation, DistillConfig),
        "adaptation shared": _table(shared, DistillConfig),
        "fine-tuning": _table({name: recipe(_BASE).flat() for name, recipe in _shown(FINE_TUNING)}, FinetuneConfig),
        "segmentation": _table({name: recipe(_BASE).flat() for name, recipe in _shown(SEGMENTATION)}, SegmentConfig),
    }


def _shown(recipes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """All but the one that only shows that everything runs."""
    return [(name, recipe) for name, recipe in recipes.items() if name != "smoke"]


def _table(columns: Mapping[str, Mapping[str, Any]], flags: type) -> str:
    known = {field.name for field in dataclasses.fields(flags)}
    names = dict.fromkeys(name for values in columns.values() for name in values)
    rows = []
    for name in names:
        needed = next((_USED_WITH[start] for start in _USED_WITH if name.startswith(start)), name)
        if not any(values.get(name) and values.get(needed) for values in columns.values()):
            continue
        label = f"`--{name.replace('_', '-')}`" if name in known else name.replace("_", " ")
        rows.append([label, *(_text(values[name]) if name in values else "" for values in columns.values())])
    head = ["value", *(f"`{name.partition(',')[0]}`{''.join(name.partition(',')[1:])}" for name in columns)]
    return "\n".join(_line(cells) for cells in [head, ["---"] * len(head), *rows]) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(value: Any) -> str:
    """As a reader would write it: ``–`` for none, 0.0015, 1e-5."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        whole = all(isinstance(part, int) for part in value)  # an image size
        return ("x" if whole else ", ").join(_text(part) for part in value)
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    return str(value)


if __name__ == "__main__":
    main()
