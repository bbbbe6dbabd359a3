"""Pictures with labels to train a classifier on, and those to judge it by: ImageNet's layout, class folders, or digits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..contracts import UserError
from .sources import ClassFolderSource, DigitsSource, ImageSource, open_source

#: Folders of a data set's two parts; ImageNet calls the second ``val``.
_TRAINING, _VALIDATION = "train", "val"


@dataclass(frozen=True, kw_only=True)
class LabelledData:
    """The labelled pictures that ``--data`` names.

    Attributes:
        training: with labels.
        validation: with labels too, or None where the data have no such part.
        classes: names of the classes, by number.
    """

    training: ImageSource
    validation: ImageSource | None
    classes: tuple[str, ...]


def open_labelled(data: str) -> LabelledData:
    """Open ``train/`` and ``val/`` with a folder a class in each, a folder of class folders, or built-in digits.

    Of ``builtin:digits`` the test digits are for validation; ``builtin:digits-train`` has no such part.

    Raises:
        UserError: none of that.
    """
    if data.startswith("builtin:"):
        both = data == "builtin:digits"
        source = open_source("builtin:digits-train" if both else data)
        assert isinstance(source, DigitsSource)
        return LabelledData(training=source, validation=DigitsSource("test") if both else None, classes=source.classes)
    parts = [Path(data) / name for name in (_TRAINING, _VALIDATION)]
    there = [part for part in parts if part.is_dir()]
    if len(there) == 1:
        missing = next(part for part in parts if part not in there)
        raise UserError("--data", data, f"holds {there[0].name}/ but no {missing.name}/; give both, or the folder in which "
                        "the class folders stand")  # fmt: skip
    if not there:
        training = ClassFolderSource(data)
        return LabelledData(training=training, validation=None, classes=training.classes)
    training = ClassFolderSource(parts[0], called=f"{_TRAINING}/")
    validation = ClassFolderSource(parts[1], training.classes, called=f"{_VALIDATION}/")
    return LabelledData(training=training, validation=validation, classes=training.classes)


def choose_labelled(labels: Sequence[int] | np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Numbers of a share of every class, drawn by ``seed``: at least one picture a class, in their order.

    Args:
        labels: ``[N]`` class numbers.
        fraction: in (0, 1].
        seed: of the draw.

    Raises:
        UserError: the fraction is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError("--label-fraction", fraction, "must be in (0, 1]")
    labels, rng = np.asarray(labels), np.random.default_rng([seed, 3])
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    chosen = [rng.permutation(numbers)[: max(1, round(fraction * len(numbers)))] for numbers in members]
    return np.sort(np.concatenate(chosen))
