"""A trained `Segmenter` in a folder: timm's folder for the backbone, and beside it the head and what the classes are.

``config.json`` and ``model.safetensors`` are the backbone's, so ``timm.create_model("local-dir:FOLDER", pretrained=True)``
reads it as any other; ``head.safetensors`` holds every parameter and buffer outside the backbone, ``segmentation.json`` the
rest. What is loaded equals what was saved, bit for bit. Nothing is unpickled.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..contracts import UserError
from .loading import create_backbone, model_folder, save_model_folder
from .segmenter import BACKBONE, Head, Segmenter

_HEAD, _INFO = "head.safetensors", "segmentation.json"


@dataclass(frozen=True, kw_only=True)
class SegmentationInfo:
    """What ``segmentation.json`` says.

    Attributes:
        head: kind of head.
        head_width: channels inside it.
        classes: names of the classes, by number.
        palette: (red, green, blue) of each class, 0 to 255.
        extra: whatever else the maker noted (crop, resize, ...), as JSON has it: tuples come back as lists.
    """

    head: Head
    head_width: int
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    extra: dict[str, Any] = field(default_factory=dict)


def save_segmenter(
    segmenter: Segmenter,
    folder: Path,
    *,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]] | Any,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a segmenter; a reader sees the old folder or the new one, never a half-written one.

    Args:
        segmenter: in any mode.
        folder: takes the place of whatever it held.
        classes: names of the classes, by number.
        palette: ``[C, 3]`` red, green, blue of each class, 0 to 255.
        extra: further JSON values, e.g. the crop.

    Raises:
        ValueError: not one name and one colour for each class of the head.
    """
    colours = tuple((int(red), int(green), int(blue)) for red, green, blue in palette)
    if not len(classes) == len(colours) == segmenter.num_classes:
        raise ValueError(f"{segmenter.num_classes} classes need as many names ({len(classes)}) and colours ({len(colours)})")
    info = SegmentationInfo(
        head=segmenter.head,
        head_width=segmenter.head_width,
        classes=tuple(classes),
        palette=colours,
        extra=dict(extra or {}),
    )
    text = json.dumps(asdict(info), indent=2, ensure_ascii=False) + "\n"

    def write_head(fresh: Path) -> None:
        save_file(_outside_backbone(segmenter), fresh / _HEAD)
        (fresh / _HEAD).chmod((fresh / "config.json").stat().st_mode)  # safetensors are written for their owner alone
        (fresh / _INFO).write_text(text, encoding="utf-8")

    save_model_folder(segmenter.backbone, folder, check=write_head)


def is_segmenter(path: str | os.PathLike[str]) -> bool:
    """Whether a run folder or model folder holds a segmentation model."""
    folder = model_folder(path)
    return folder is not None and (folder / _INFO).is_file()


def load_segmenter(path: str | os.PathLike[str], *, name: str = "model") -> tuple[Segmenter, SegmentationInfo]:
    """Read what `save_segmenter` wrote, in evaluation mode.

    Args:
        path: a run folder, or the model folder in it.
        name: the flag that the path came from, for messages.

    Raises:
        UserError: there is no segmentation model, its files cannot be read or do not fit each other, or the head needs a
            package that is not installed.
    """
    folder = model_folder(path)
    if folder is None or not (folder / _INFO).is_file():
        remedy = f"holds no segmentation model (no {_INFO} beside its weights); give a run of segment, or its model folder"
        raise UserError(name, path, remedy)
    info = _read_info(folder / _INFO, name)
    backbone = create_backbone(os.fspath(folder), field=name)
    segmenter = Segmenter(backbone, num_classes=len(info.classes), head=info.head, head_width=info.head_width)
    head = folder / _HEAD
    expected = _outside_backbone(segmenter)
    try:
        found = load_file(head)
    except Exception as error:  # safetensors' own error has no public base class
        raise UserError(name, head, f"cannot be read ({_one_line(error)}); copy the whole folder again") from error
    different = sorted(
        key
        for key in {*found, *expected}
        if key not in found or key not in expected or found[key].shape != expected[key].shape
    )
    if different:
        remedy = (
            f"does not fit {_INFO}: {', '.join(different[:3])}{' ...' if len(different) > 3 else ''}; copy the whole folder"
        )
        raise UserError(name, head, remedy)
    segmenter.load_state_dict(found, strict=False)
    return segmenter.eval(), info


def _outside_backbone(segmenter: Segmenter) -> dict[str, Tensor]:
    state = segmenter.state_dict()
    return {key: value.contiguous() for key, value in state.items() if not key.startswith(BACKBONE)}


def _read_info(file: Path, name: str) -> SegmentationInfo:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        known = {key.name: values[key.name] for key in fields(SegmentationInfo)}
        known["classes"] = tuple(map(str, known["classes"]))
        known["palette"] = tuple((int(red), int(green), int(blue)) for red, green, blue in known["palette"])
        return SegmentationInfo(**known)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"has no {error}" if isinstance(error, KeyError) else f"cannot be read ({_one_line(error)})"
        raise UserError(name, file, f"{reason}; copy the whole folder again") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
