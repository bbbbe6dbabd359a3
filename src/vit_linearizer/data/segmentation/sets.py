"""Where pictures with masks come from: ADE20K, Cityscapes, or a folder of one's own.

ADE20K is the scene-parsing benchmark of 150 classes (Zhou et al., CVPR 2017), whose label 0 is "other" and ignored;
Cityscapes (Cordts et al., arXiv 1604.01685) has 19 classes, by torchvision's table of its labels. Class numbers start at 0.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
from PIL import Image
from torchvision.datasets import Cityscapes

from ...contracts import UserError, did_you_mean
from ..images import EXTENSIONS, UnreadableImageError, header_problem, read_image, walk_images
from .masks import IGNORED, ClassTable, WrongMaskError, read_mask
from .shapes import SHAPES, ShapesSource

__all__ = ["IGNORED", "SegmentationKind", "SegmentationSource", "Split", "open_segmentation"]

SegmentationKind = Literal["ade20k", "cityscapes", "folder"]
Split = Literal["train", "val"]

_ADE20K_CLASSES = 150
_CITYSCAPES_SIZE = (512, 1024)
#: Light grey for the first class, which is often the ground; then the Okabe-Ito colours and two more.
_FEW_COLOURS = (
    (220, 220, 220), (213, 94, 0), (0, 114, 178), (0, 158, 115), (240, 228, 66), (204, 121, 167), (86, 180, 233),
    (230, 159, 0), (120, 60, 200), (140, 86, 75),
)  # fmt: skip
#: Masks whose values are looked at when a data set is opened.
_CHECKED = 64


class SegmentationSource(Protocol):
    """Pictures and their masks by number.

    Attributes:
        classes: name of each class.
        palette: ``[C, 3]`` uint8, a colour for each class.
        skipped: (name, reason) of pictures passed over when the source was opened.
        seen: class numbers in the masks that were looked at then, with 255 where there is something ignored.
        resize: (height, width) in pixels that every picture is resized to, or None where each keeps its shape.
    """

    classes: tuple[str, ...]
    palette: np.ndarray
    skipped: list[tuple[str, str]]
    seen: set[int]
    resize: tuple[int, int] | None

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The picture's path, relative to the data folder."""
        ...

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """The picture as 8-bit RGB, and ``[H, W]`` uint8 class numbers, 255 ignored; raises UnreadableImageError."""
        ...


class _MaskedPictures:
    """One split of a data set: pairs of paths, and what their masks' values mean."""

    def __init__(
        self,
        folder: Path,
        pairs: list[tuple[Path, Path]],
        table: ClassTable,
        *,
        classes: tuple[str, ...],
        palette: np.ndarray,
        expected: str,
        resize: tuple[int, int] | None = None,
    ):
        self.folder, self.table = folder, table
        self.classes, self.palette, self.resize = classes, palette, resize
        if not pairs:
            raise UserError("--data", folder, f"holds no images of this split; expected {expected}")
        with ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as pool:
            problems = list(pool.map(lambda pair: _pair_problem(folder, *pair), pairs))
            self.pairs = [pair for pair, problem in zip(pairs, problems, strict=True) if problem is None]
            self.skipped = [
                (image.as_posix(), problem)
                for (image, _), problem in zip(pairs, problems, strict=True)
                if problem is not None
            ]
            if not self.pairs:
                first = ": ".join(self.skipped[0])
                raise UserError("--data", folder, f"none of the {len(pairs)} images of this split can be used; {first}")
            spread = np.linspace(0, len(self.pairs) - 1, min(len(self.pairs), _CHECKED)).astype(int)
            self.seen: set[int] = set().union(*pool.map(self._values, spread.tolist()))

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index][0].as_posix()

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        image_path, mask_path = self.pairs[index]
        image = read_image(self.folder / image_path)
        try:
            mask = self.table.numbers(read_mask(self.folder / mask_path))
        except UnreadableImageError as problem:
            raise UnreadableImageError(f"mask {mask_path.as_posix()}: {problem}") from problem
        if mask.shape != (image.height, image.width):
            sizes = f"{mask.shape[0]}x{mask.shape[1]} pixels, but its picture, upright, {image.height}x{image.width}"
            raise UnreadableImageError(f"mask {mask_path.as_posix()}: {sizes}")
        return image, mask

    def _values(self, index: int) -> set[int]:
        """Class numbers in a mask; of a broken one none, as it is passed over and counted when its turn comes."""
        path = self.folder / self.pairs[index][1]
        try:
            return set(np.unique(self.table.numbers(read_mask(path))).tolist())
        except WrongMaskError as problem:
            raise UserError("--data", path, str(problem)) from problem
        except UnreadableImageError:
            return set()


def open_segmentation(data: str, kind: SegmentationKind, split: Split) -> SegmentationSource:
    """One split of the data set in a folder.

    Pictures without a mask, and pairs of which a header cannot be read, are passed over and listed in ``skipped``. The
    values of up to 64 masks, evenly spread, are checked at once; the others when they are read.

    Args:
        data: the folder. ``ade20k``: ADEChallengeData2016 or its parent, with ``images/{training,validation}/*.jpg``
            and ``annotations/{training,validation}/*.png``. ``cityscapes``: with ``leftImg8bit`` and ``gtFine``.
            ``folder``: with ``images/{train,val}/STEM.*``, ``masks/{train,val}/STEM.png`` and ``classes.txt``, where a
            mask's value is the 0-based line of its class and 255 is ignored; in any depth of folders below the split's; or
            ``builtin:shapes``, generated pictures.
        kind: what lies there.
        split: the part to train on or the one to validate on.

    Returns:
        The source; at least one picture in it.

    Raises:
        UserError: no such folder, split, classes or masks, or a mask that holds colours or a value that is no class.
    """
    openers = {"ade20k": _open_ade20k, "cityscapes": _open_cityscapes, "folder": _open_folder}
    if kind not in openers:
        raise UserError("--dataset", kind, f"must be one of {', '.join(openers)}{did_you_mean(kind, openers)}")
    if split not in get_args(Split):
        raise UserError("--split", split, "must be train or val")
    if data == SHAPES:
        if kind != "folder":
            raise UserError("--dataset", kind, f"{SHAPES} goes with --dataset folder")
        return ShapesSource(split, _colours(len(ShapesSource.classes)))
    folder = Path(data)
    if not folder.is_dir():
        raise UserError("--data", data, "no such folder; give a folder of images and masks")
    return openers[kind](folder, split)


def _open_folder(folder: Path, split: Split) -> _MaskedPictures:
    expected = f"images/{split}/NAME with one of {' '.join(EXTENSIONS)}, masks/{split}/NAME.png, and classes.txt"
    pairs = _pairs(folder, f"images/{split}", f"masks/{split}", expected)
    classes = _listed_classes(folder / "classes.txt")
    values = {number: number for number in range(len(classes))} | {IGNORED: IGNORED}
    lines = f"{len(classes)} lines" if len(classes) > 1 else "1 line"
    allowed = f"classes.txt has {lines} (0 to {len(classes) - 1}, and {IGNORED} for what is ignored)"
    table = ClassTable(values, allowed=allowed)
    return _MaskedPictures(folder, pairs, table, classes=classes, palette=_colours(len(classes)), expected=expected)


def _open_ade20k(folder: Path, split: Split) -> _MaskedPictures:
    inner = folder / "ADEChallengeData2016"
    folder = inner if inner.is_dir() else folder
    part = {"train": "training", "val": "validation"}[split]
    expected = f"ADEChallengeData2016 with images/{part}/*.jpg and annotations/{part}/*.png"
    pairs = _pairs(folder, f"images/{part}", f"annotations/{part}", expected)
    # 255 is what tools that already know ignored pixels write.
    values = {value: value - 1 for value in range(1, _ADE20K_CLASSES + 1)} | {0: IGNORED, IGNORED: IGNORED}
    table = ClassTable(values, allowed=f"ADE20K has 1 to {_ADE20K_CLASSES}, and 0 for what is ignored")
    classes = _ade20k_classes(folder / "objectInfo150.txt")
    return _MaskedPictures(folder, pairs, table, classes=classes, palette=_colours(len(classes)), expected=expected)


def _open_cityscapes(folder: Path, split: Split) -> _MaskedPictures:
    images, masks = f"leftImg8bit/{split}", f"gtFine/{split}"
    expected = f"{images}/CITY/*_leftImg8bit.png and {masks}/CITY/*_gtFine_labelIds.png"
    for needed in (images, masks):  # torchvision would unpack gigabytes of archives instead of saying so
        if not (folder / needed).is_dir():
            raise UserError("--data", folder, f"has no folder {needed}; expected {expected}")
    try:
        listed = Cityscapes(str(folder), split=split, mode="fine", target_type="semantic")
    except (RuntimeError, OSError) as error:
        raise UserError("--data", folder, f"{' '.join(str(error).split())}; expected {expected} and nothing else") from error
    found = zip(listed.images, (targets[0] for targets in listed.targets), strict=True)
    pairs = sorted(
        (Path(image).relative_to(folder), Path(mask).relative_to(folder))
        for image, mask in found
        if image.endswith("_leftImg8bit.png")
    )
    counted = sorted((entry.train_id, entry) for entry in Cityscapes.classes if entry.train_id not in (-1, IGNORED))
    values = dict.fromkeys(range(256), IGNORED)
    values |= {entry.id: entry.train_id for entry in Cityscapes.classes if entry.id >= 0}
    return _MaskedPictures(
        folder,
        pairs,
        ClassTable(values, allowed="Cityscapes has 0 to 33, and 255 for what is ignored"),
        classes=tuple(entry.name for _, entry in counted),
        palette=np.array([entry.color for _, entry in counted], dtype=np.uint8),
        expected=expected,
        resize=_CITYSCAPES_SIZE,
    )


def _pairs(folder: Path, images: str, masks: str, expected: str) -> list[tuple[Path, Path]]:
    """Each image of a folder and where its mask should be."""
    if not (folder / images).is_dir():
        raise UserError("--data", folder, f"has no folder {images}; expected {expected}")
    found = sorted(walk_images(folder / images), key=lambda path: path.as_posix())
    return [(images / path, (masks / path).with_suffix(".png")) for path in found]


def _pair_problem(folder: Path, image: Path, mask: Path) -> str | None:
    if not (folder / mask).is_file():
        return f"no mask {mask.as_posix()}"
    if problem := header_problem(folder / image):
        return problem
    problem = header_problem(folder / mask)
    return f"mask {mask.as_posix()}: {problem}" if problem else None


def _listed_classes(path: Path) -> tuple[str, ...]:
    remedy = "write the name of one class a line, in the order of the masks' values"
    if not path.is_file():
        raise UserError("--data", path, f"no such file; {remedy}")
    names = [line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").rstrip().splitlines()]
    if not names or not all(names):
        what = f"line {names.index('') + 1} is empty" if names else "is empty"
        raise UserError("--data", path, f"{what}; {remedy}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError("--data", path, f"names {twice} twice; every class needs a name of its own")
    if len(names) > IGNORED:
        raise UserError("--data", path, f"has {len(names)} lines; a mask can hold {IGNORED} classes at most")
    return tuple(names)


def _ade20k_classes(path: Path) -> tuple[str, ...]:
    """First names in the benchmark's table, whose columns differ between its releases; numbers where it is missing."""
    names = {}
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines() if path.is_file() else ():
        fields = [field.strip() for field in line.split("\t")]
        words = [field for field in fields[1:] if re.search("[A-Za-z]", field)]
        if fields[0].isdecimal() and words:
            names[int(fields[0])] = re.split("[,;]", words[-1])[0].strip()
    return tuple(names.get(number, f"class {number}") for number in range(1, _ADE20K_CLASSES + 1))


def _colours(count: int) -> np.ndarray:
    """``[count, 3]`` uint8: up to ten colours that are easy to tell apart; for more classes the colour map of PASCAL VOC.

    Of that map the first entry, black, is left for the ignored. The bits of an entry's number are dealt to red, green and
    blue in turn, from the highest bit of each down, so that 255 colours differ and neighbours differ much.
    """
    if count <= len(_FEW_COLOURS):
        return np.array(_FEW_COLOURS[:count], dtype=np.uint8)
    entries, channels = np.arange(1, count + 1)[:, None], np.arange(3)
    colours = np.zeros((count, 3), dtype=np.uint8)
    for bit in range(8):
        colours |= (((entries >> (3 * bit + channels)) & 1) << (7 - bit)).astype(np.uint8)
    return colours
