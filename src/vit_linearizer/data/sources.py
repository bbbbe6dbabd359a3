"""Where pictures come from: a folder of files, or the handwritten digits that ship with scikit-learn."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from ..contracts import UserError, did_you_mean
from .images import read_image, scan_folder

BUILTIN = ("builtin:digits", "builtin:digits-train", "builtin:digits-test")

#: What the subfolders of a folder of images mean.
Labels = Literal["none", "folder"]

#: Digits of `builtin:digits-test` are every image whose shuffled place is in the first fifth of its class.
_DIGITS_TEST_SHARE = 0.2
_DIGITS_SIZE = 32
_DIGITS_SPLIT_SEED = 0


class ImageSource(Protocol):
    """Pictures by number.

    Attributes:
        labels: ``[len]`` class numbers, or None when there are none.
        skipped: (name, reason) of files passed over when the source was opened.
    """

    labels: np.ndarray | None
    skipped: list[tuple[str, str]]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call a picture in lists and messages."""
        ...

    def read(self, index: int) -> Image.Image:
        """The picture as 8-bit RGB; raises UnreadableImageError."""
        ...


class FolderSource:
    """A folder of images, searched recursively, without labels."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.paths, skipped = scan_folder(self.folder)
        self.skipped = [(path.as_posix(), reason) for path, reason in skipped]
        self.labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index].as_posix()

    def read(self, index: int) -> Image.Image:
        return read_image(self.folder / self.paths[index])


class ClassFolderSource(FolderSource):
    """A folder of class folders: what stands under ``cat/``, at any depth, is a cat.

    Args:
        folder: holds one folder a class.
        classes: their names in the order of their numbers; by default all there are, sorted.
        called: what names of pictures begin with, to tell the two parts of a data set apart.

    Raises:
        UserError: no class folders, or one that is not among the classes.
    """

    def __init__(self, folder: str | os.PathLike[str], classes: Sequence[str] | None = None, *, called: str = ""):
        super().__init__(folder)
        self.called = called
        loose = [path for path in self.paths if len(path.parts) == 1]
        self.skipped += [(path.as_posix(), "in no class folder") for path in loose]
        self.paths = [path for path in self.paths if len(path.parts) > 1]
        names = [path.parts[0] for path in self.paths]
        if not names:
            raise UserError("--data", folder, "holds no class folders with images; expected CLASS/IMAGE files")
        self.classes = tuple(classes or sorted(set(names)))
        number = {name: index for index, name in enumerate(self.classes)}
        if unknown := sorted(set(names) - number.keys()):
            known = f"{len(self.classes)} classes, {', '.join(self.classes[:3])}, ..."
            raise UserError("--data", Path(folder) / unknown[0], f"is no class folder of the training images ({known})")
        self.labels = np.array([number[name] for name in names])
        self.skipped = [(called + name, reason) for name, reason in self.skipped]

    def name(self, index: int) -> str:
        return self.called + super().name(index)


class DigitsSource:
    """The 1797 handwritten digits (8x8 pixels) of scikit-learn, as RGB pictures of 32x32 pixels.

    Args:
        split: ``train``, ``test`` (a fixed, class-balanced fifth) or None for all.
    """

    def __init__(self, split: str | None = None):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        chosen = np.arange(len(digits.target))
        if split is not None:
            train, test = train_test_split(
                chosen, test_size=_DIGITS_TEST_SHARE, stratify=digits.target, random_state=_DIGITS_SPLIT_SEED
            )
            chosen = np.sort(train if split == "train" else test)
        pixels = np.rint(digits.images[chosen] / 16 * 255).astype(np.uint8)
        size = (_DIGITS_SIZE, _DIGITS_SIZE)
        self._pictures = [Image.fromarray(p).resize(size, Image.Resampling.BICUBIC).convert("RGB") for p in pixels]
        self.labels: np.ndarray | None = digits.target[chosen].astype(np.int64)
        self.skipped: list[tuple[str, str]] = []
        self.classes = tuple(str(digit) for digit in digits.target_names)
        self._ids = chosen

    def __len__(self) -> int:
        return len(self._pictures)

    def name(self, index: int) -> str:
        return f"digit-{self._ids[index]:04d}"

    def read(self, index: int) -> Image.Image:
        return self._pictures[index]


def open_source(data: str, labels: Labels = "none") -> ImageSource:
    """The pictures that ``--data`` names: a folder, or one of ``builtin:digits``, ``-train`` and ``-test``.

    Args:
        data: of the command.
        labels: ``folder`` when its subfolders are classes; ``none`` looks at the pictures alone.

    Raises:
        UserError: no such folder or built-in set, or nothing readable in it.
    """
    if data.startswith("builtin:"):
        if data not in BUILTIN:
            raise UserError("--data", data, f"unknown built-in data{did_you_mean(data, BUILTIN)}")
        return DigitsSource(data.partition("-")[2] or None)
    return ClassFolderSource(data) if labels == "folder" else FolderSource(data)
