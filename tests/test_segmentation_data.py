"""Pictures with masks: three layouts, every kind of mask file, what is passed over, and views that keep both aligned."""

import random
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segmentation_folders import ADE20K_LABELS, CLASSES, save, shapes, write_ade20k, write_cityscapes, write_folder
from vit_linearizer.contracts import UserError
from vit_linearizer.data.datasets import SkippedList, training_loader
from vit_linearizer.data.images import UnreadableImageError
from vit_linearizer.data.sampler import Draw, StepSampler
from vit_linearizer.data.segmentation.datasets import (
    SegmentationEvaluationSet,
    SegmentationTrainingSet,
    evaluation_loader,
)
from vit_linearizer.data.segmentation.masks import read_mask
from vit_linearizer.data.segmentation.sets import IGNORED, open_segmentation
from vit_linearizer.data.segmentation.views import (
    SegmentationView,
    SegmentationViewConfig,
    evaluation_view,
    fitted_size,
)

PLAIN = dict(scales=(1.0, 1.0), horizontal_flip=0.0, colour=False, largest_class_share=1.0)


def view(crop, *, resize=None, seed=0, **changes):
    return SegmentationView(crop, SegmentationViewConfig(**changes), resize=resize, seed=seed)


def one_pair(folder: Path, image: np.ndarray, mask: np.ndarray, classes=CLASSES) -> Path:
    """A folder with a single training picture."""
    save(image, mask, folder / "images/train/a.png", folder / "masks/train/a.png")
    (folder / "classes.txt").write_text("\n".join(classes))
    return folder


def pair(size=(12, 16), seed=0):
    return shapes(np.random.default_rng(seed), size)


# --- a folder of one's own


def test_a_folder_gives_what_was_written_in_it(tmp_path):
    source = open_segmentation(str(write_folder(tmp_path)), "folder", "val")
    assert source.classes == CLASSES
    assert (source.palette.shape, source.palette.dtype) == ((3, 3), np.uint8)
    assert (len(source), source.skipped, source.resize) == (4, [], None)
    assert [source.name(number) for number in range(4)] == [f"images/val/{number:02d}.png" for number in range(4)]
    for number in range(4):
        image, mask = source.read(number)
        assert (image.mode, mask.dtype) == ("RGB", np.uint8)
        np.testing.assert_array_equal(image, Image.open(tmp_path / f"images/val/{number:02d}.png"))
        np.testing.assert_array_equal(mask, Image.open(tmp_path / f"masks/val/{number:02d}.png"))


def test_pictures_lie_in_any_depth_and_of_any_kind(tmp_path):
    image, mask = pair()
    mask[0, 0] = IGNORED
    for name in ("images/train/b/two.words.jpg", "images/train/a.webp"):
        save(image, mask, tmp_path / name, (tmp_path / name.replace("images", "masks")).with_suffix(".png"))
    (tmp_path / "images/train/.hidden.jpg").write_bytes(b"")
    (tmp_path / "classes.txt").write_text("\ufeffground \n disc\nbox\n\n\n", encoding="utf-8")
    source = open_segmentation(str(tmp_path), "folder", "train")
    assert [source.name(number) for number in range(len(source))] == ["images/train/a.webp", "images/train/b/two.words.jpg"]
    assert source.classes == CLASSES
    np.testing.assert_array_equal(source.read(1)[1], mask)


def test_a_palette_has_a_colour_for_each_of_255_classes(tmp_path):
    one_pair(tmp_path, *pair(), classes=[f"c{number}" for number in range(255)])
    palette = open_segmentation(str(tmp_path), "folder", "train").palette
    assert len(np.unique(palette, axis=0)) == 255
    assert palette.any(axis=1).all()  # none is black
    # The first colours of PASCAL VOC's map.
    assert palette[:4].tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]


def test_few_classes_have_colours_far_apart(tmp_path):
    one_pair(tmp_path, *pair(), classes=[f"c{number}" for number in range(10)])
    palette = open_segmentation(str(tmp_path), "folder", "train").palette.astype(float)
    apart = np.linalg.norm(palette[:, None] - palette[None], axis=-1) + 1000 * np.eye(10)
    assert apart.min() > 60


def test_a_class_named_twice_is_refused(tmp_path):
    one_pair(tmp_path, *pair(), classes=["ground", "tree", "ground"])
    with pytest.raises(UserError, match=r"classes.txt: names ground twice"):
        open_segmentation(str(tmp_path), "folder", "train")


def test_the_classes_of_the_masks_looked_at_are_known(tmp_path):
    """A mask of 0 and 255 where classes are 0 to 2 is a common mistake, and a valid mask."""
    image, mask = pair()
    one_pair(tmp_path, image, np.where(mask == 0, 0, 255).astype(np.uint8))
    assert open_segmentation(str(tmp_path), "folder", "train").seen == {0, 255}


@pytest.mark.parametrize("kind", ["ade20k", "cityscapes"])
def test_generated_shapes_are_no_other_data_set(kind):
    with pytest.raises(UserError, match=r"--dataset .*builtin:shapes goes with --dataset folder"):
        open_segmentation("builtin:shapes", kind, "train")


@pytest.mark.parametrize("split", ["train", "val"])
def test_generated_shapes_are_the_same_every_time(split):
    first, second = (open_segmentation("builtin:shapes", "folder", split) for _ in range(2))
    assert len(first) == {"train": 240, "val": 60}[split]
    for number in (0, 7, len(first) - 1):
        (image, mask), (again, same) = first.read(number), second.read(number)
        assert image.size == (96, 96) and mask.shape == (96, 96)
        assert np.array_equal(image, again) and np.array_equal(mask, same)
    seen = {int(value) for number in range(len(first)) for value in np.unique(first.read(number)[1])}
    assert seen == first.seen == set(range(5))


# --- kinds of mask files

VALUES = np.array([[0, 1, 2], [2, 1, 255]], dtype=np.uint8)


def grey_png(path: Path, values: np.ndarray, bits: int) -> None:
    """A greyscale PNG of so many bits a pixel, by the letter of the PNG specification; Pillow writes none below 8."""
    rows = b""
    for row in values:
        digits = "".join(format(int(value), f"0{bits}b") for value in row)
        digits += "0" * (-len(digits) % 8)
        rows += b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big")

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def indexed(values: np.ndarray) -> Image.Image:
    image = Image.fromarray(values).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([255 - number // 3 for number in range(768)])
    return image


@pytest.mark.parametrize(
    ("write", "values"),
    [
        (lambda path: Image.fromarray(VALUES).save(path), VALUES),
        (lambda path: indexed(VALUES).save(path), VALUES),
        (lambda path: indexed(VALUES % 4).save(path, bits=2), VALUES % 4),
        (lambda path: indexed(VALUES).save(path, transparency=1), VALUES),
        (lambda path: Image.fromarray(VALUES.astype(np.uint16)).save(path), VALUES),
        (lambda path: grey_png(path, VALUES, 8), VALUES),
        (lambda path: grey_png(path, VALUES % 16, 4), VALUES % 16),
        (lambda path: grey_png(path, VALUES % 4, 2), VALUES % 4),
        (lambda path: grey_png(path, VALUES % 2, 1), VALUES % 2),
        (lambda path: grey_png(path, VALUES.astype(int) * 200, 16), VALUES.astype(int) * 200),
    ],
    ids=["grey", "palette", "palette of 2 bits", "transparent palette", "16 bits", "8 bits by hand", "4 bits", "2 bits",
         "1 bit", "16 bits, large"],
)  # fmt: skip
def test_a_mask_is_the_numbers_in_its_file(tmp_path, write, values):
    write(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), values)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


#: What happens to a file of a picture after its set was opened, and the reason given for passing it over.
BROKEN = {
    "broken image": (lambda image, mask: truncated(image), "^OSError|^SyntaxError|^ValueError"),
    "image gone": (lambda image, mask: image.unlink(), "^FileNotFoundError"),
    "broken mask": (lambda image, mask: truncated(mask), "^mask masks/train/a.png: (OSError|SyntaxError|ValueError)"),
    "empty mask": (lambda image, mask: mask.write_bytes(b""), "^mask masks/train/a.png: UnidentifiedImageError"),
    "other size": (
        lambda image, mask: Image.new("L", (12, 16)).save(mask),
        "^mask masks/train/a.png: 16x12 pixels, but its picture, upright, 12x16$",
    ),
    "unknown class": (
        lambda image, mask: Image.new("L", (16, 12), 7).save(mask),
        r"^mask masks/train/a.png: holds class value 7; classes.txt has 3 lines \(0 to 2, and 255 for what is ignored\)$",
    ),
    "16 bits, beyond any class": (
        lambda image, mask: Image.fromarray(np.full((12, 16), 300, dtype=np.uint16)).save(mask),
        "^mask masks/train/a.png: holds class value 300; ",
    ),
    "colours": (
        lambda image, mask: Image.new("RGB", (16, 12)).save(mask),
        "^mask masks/train/a.png: is a PNG of mode RGB; a mask must be a greyscale or palette PNG",
    ),
    "another format": (
        lambda image, mask: Image.new("L", (16, 12)).save(mask, "JPEG"),
        "^mask masks/train/a.png: is a JPEG of mode L; a mask must be a greyscale or palette PNG",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_says_why_in_a_line(tmp_path, case):
    image, mask = pair()
    source = open_segmentation(str(one_pair(tmp_path, image, mask)), "folder", "train")
    spoil, reason = BROKEN[case]
    spoil(tmp_path / "images/train/a.png", tmp_path / "masks/train/a.png")
    with pytest.raises(UnreadableImageError, match=reason) as raised:
        source.read(0)
    assert "\n" not in str(raised.value)


def turned(upright: np.ndarray) -> np.ndarray:
    """How a camera held at EXIF orientation 6 stores it: the first row is the right side, the first column the top."""
    return np.ascontiguousarray(upright.swapaxes(0, 1)[::-1])


def with_orientation(array: np.ndarray, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(array).save(path, exif=exif)


def test_a_turned_picture_fits_the_mask_of_the_upright_one(tmp_path):
    image, mask = pair()
    one_pair(tmp_path, image, mask)
    with_orientation(turned(image), tmp_path / "images/train/a.png")
    found, classes = open_segmentation(str(tmp_path), "folder", "train").read(0)
    np.testing.assert_array_equal(found, image)
    np.testing.assert_array_equal(classes, mask)


def test_a_mask_is_turned_by_its_own_orientation_alone(tmp_path):
    image, mask = pair()
    one_pair(tmp_path, image, mask)
    with_orientation(turned(image), tmp_path / "images/train/a.png")
    source = open_segmentation(str(tmp_path), "folder", "train")
    with_orientation(turned(mask), tmp_path / "masks/train/a.png")
    np.testing.assert_array_equal(source.read(0)[1], mask)
    Image.fromarray(turned(mask)).save(tmp_path / "masks/train/a.png")
    with pytest.raises(UnreadableImageError, match="16x12 pixels, but its picture, upright, 12x16"):
        source.read(0)


# --- what is wrong with a folder


def test_pictures_without_a_mask_or_a_header_are_passed_over_and_listed(tmp_path):
    write_folder(tmp_path, pictures=6)
    (tmp_path / "masks/train/01.png").unlink()
    (tmp_path / "images/train/02.png").write_bytes(b"no image")
    (tmp_path / "masks/train/04.png").write_bytes(b"no mask")
    source = open_segmentation(str(tmp_path), "folder", "train")
    assert [source.name(number) for number in range(len(source))] == [f"images/train/0{number}.png" for number in (0, 3, 5)]
    names, reasons = zip(*source.skipped, strict=True)
    assert names == tuple(f"images/train/0{number}.png" for number in (1, 2, 4))
    assert reasons[0] == "no mask masks/train/01.png"
    assert reasons[1].startswith("UnidentifiedImageError")
    assert reasons[2].startswith("mask masks/train/04.png: UnidentifiedImageError")


def no_folder(path: Path) -> None:
    shutil.rmtree(path)


def no_split(path: Path) -> None:
    shutil.rmtree(path / "images/train")


def empty_split(path: Path) -> None:
    no_split(path)
    (path / "images/train").mkdir()


def no_masks(path: Path) -> None:
    shutil.rmtree(path / "masks")


def no_classes(path: Path) -> None:
    (path / "classes.txt").unlink()


def empty_classes(path: Path) -> None:
    (path / "classes.txt").write_text("\n \n")


def gap_in_classes(path: Path) -> None:
    (path / "classes.txt").write_text("ground\n\nbox\n")


def many_classes(path: Path) -> None:
    (path / "classes.txt").write_text("".join(f"thing {number}\n" for number in range(256)))


def unknown_class(path: Path) -> None:
    Image.new("L", (64, 48), 7).save(path / "masks/train/02.png")


def one_class(path: Path) -> None:
    (path / "classes.txt").write_text("ground\n")
    Image.new("L", (64, 48), 3).save(path / "masks/train/00.png")


def colours(path: Path) -> None:
    Image.new("RGB", (64, 48)).save(path / "masks/train/02.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_folder, "^--data {path}: no such folder"),
        (no_split, "^--data {path}: has no folder images/train; expected images/train/NAME .*masks/train/NAME.png"),
        (empty_split, "^--data {path}: holds no images of this split; expected images/train/NAME"),
        (no_masks, "^--data {path}: none of the 4 images .* images/train/00.png: no mask masks/train/00.png$"),
        (no_classes, "^--data {path}/classes.txt: no such file; write the name of one class a line"),
        (empty_classes, "^--data {path}/classes.txt: is empty; write"),
        (gap_in_classes, "^--data {path}/classes.txt: line 2 is empty; write"),
        (many_classes, "^--data {path}/classes.txt: has 256 lines; a mask can hold 255 classes at most"),
        (
            unknown_class,
            r"^--data {path}/masks/train/02.png: holds class value 7; classes.txt has 3 lines "
            r"\(0 to 2, and 255 for what is ignored\)$",
        ),
        (one_class, r"^--data {path}/masks/train/00.png: holds class value 3; classes.txt has 1 line \(0 to 0, "),
        (colours, "^--data {path}/masks/train/02.png: is a PNG of mode RGB; a mask must be a greyscale or palette PNG"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_that_cannot_do_says_what_is_missing(tmp_path, spoil, message):
    spoil(write_folder(tmp_path / "data"))
    with pytest.raises(UserError, match=message.replace("{path}", str(tmp_path / "data"))):
        open_segmentation(str(tmp_path / "data"), "folder", "train")


def test_kinds_and_splits_are_named(tmp_path):
    with pytest.raises(UserError, match=r"--dataset cityscape: must be one of .*; did you mean cityscapes\?"):
        open_segmentation(str(tmp_path), "cityscape", "train")
    with pytest.raises(UserError, match="--split test: must be train or val"):
        open_segmentation(str(tmp_path), "folder", "test")


def test_a_broken_mask_among_good_ones_does_not_stop_a_run_at_its_start(tmp_path):
    write_folder(tmp_path)
    truncated(tmp_path / "masks/train/00.png")
    source = open_segmentation(str(tmp_path), "folder", "train")
    assert len(source) == 4
    with pytest.raises(UnreadableImageError):
        source.read(0)


def test_sixty_four_masks_are_looked_at_and_evenly_spread(tmp_path):
    # 127 = 2 * 64 - 1: every second one, in the order of their names, is looked at.
    write_folder(tmp_path, pictures=127, size=(4, 4))
    names = sorted(f"{number:02d}" for number in range(127))
    for name in names[1::2]:
        Image.new("L", (4, 4), 9).save(tmp_path / f"masks/train/{name}.png")
    source = open_segmentation(str(tmp_path), "folder", "train")
    with pytest.raises(UnreadableImageError, match="holds class value 9"):
        source.read(63)
    Image.new("L", (4, 4), 9).save(tmp_path / f"masks/train/{names[126]}.png")
    with pytest.raises(UserError, match=f"masks/train/{names[126]}.png: holds class value 9"):
        open_segmentation(str(tmp_path), "folder", "train")


# --- ADE20K


@pytest.mark.parametrize("given", ["", "ADEChallengeData2016"])
def test_ade20k_starts_at_zero_and_ignores_other(tmp_path, given):
    write_ade20k(tmp_path)
    source = open_segmentation(str(tmp_path / given), "ade20k", "val")
    assert (len(source), len(source.classes), source.palette.shape, source.resize) == (4, 150, (150, 3), None)
    assert (source.classes[0], source.classes[14], source.classes[20]) == ("wall", "door", "car")
    assert source.name(0) == "images/validation/ADE_val_00000001.jpg"
    _, mask = source.read(0)
    labels = np.asarray(Image.open(tmp_path / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png"))
    assert set(np.unique(labels)) == {0, *ADE20K_LABELS}
    np.testing.assert_array_equal(mask == IGNORED, labels == 0)
    np.testing.assert_array_equal(mask[labels > 0], labels[labels > 0] - 1)
    assert open_segmentation(str(tmp_path / given), "ade20k", "train").name(0).startswith("images/training/ADE_train")


def test_ade20k_has_labels_to_150_and_no_further(tmp_path):
    write_ade20k(tmp_path)
    file = tmp_path / "ADEChallengeData2016/annotations/training/ADE_train_00000002.png"
    Image.fromarray(np.repeat(np.array([[0, 1, 150, 255]], dtype=np.uint8), 48, axis=0)).resize((64, 48), 0).save(file)
    _, mask = open_segmentation(str(tmp_path), "ade20k", "train").read(1)
    assert np.unique(mask).tolist() == [0, 149, 255]
    Image.new("L", (64, 48), 151).save(file)
    with pytest.raises(UserError, match="holds class value 151; ADE20K has 1 to 150, and 0 for what is ignored"):
        open_segmentation(str(tmp_path), "ade20k", "train")


@pytest.mark.parametrize(
    ("table", "first", "last"),
    [
        ("Idx\tRatio\tTrain\tVal\tName\n1\t0.15\t11664\t1172\twall   \n150\t0.1\t2\t3\tflag, banner", "wall", "flag"),
        ("Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.15\t11664\t1172\t1\twall;a\n150\t0\t2\t3\t0\tflag", "wall", "flag"),
        ("Idx\tRatio\tTrain\tVal\tName\tStuff\n1\t0.15\t11664\t1172\twall\t1\n150\t0\t2\t3\tflag\t0", "wall", "flag"),
        ("Idx\tRatio\t\tTrain\tVal\t\tName\n1\t0.15\t\t11664\t1172\t\twall, b\n", "wall", "class 150"),
        ("", "class 1", "class 150"),
        (None, "class 1", "class 150"),
    ],
)
def test_ade20k_names_come_from_its_table_where_there_is_one(tmp_path, table, first, last):
    file = write_ade20k(tmp_path) / "ADEChallengeData2016/objectInfo150.txt"
    file.unlink() if table is None else file.write_text(table)
    classes = open_segmentation(str(tmp_path), "ade20k", "val").classes
    assert (len(classes), classes[0], classes[1], classes[149]) == (150, first, "class 2", last)


def test_ade20k_says_what_it_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"has no folder images/training; .*images/training/\*.jpg and annotations/training"):
        open_segmentation(str(write_folder(tmp_path)), "ade20k", "train")


# --- Cityscapes


def test_cityscapes_ids_become_the_19_classes(tmp_path):
    write_cityscapes(tmp_path)
    ids = np.tile(np.array([7, 33, 0, 24, 11, 1, 29, 34, 255, 23], dtype=np.uint8), (48, 1))
    file = tmp_path / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png"
    image = tmp_path / "leftImg8bit/val/lindau/lindau_000000_000019_leftImg8bit.png"
    save(np.zeros((48, 10, 3), dtype=np.uint8), ids, image, file)
    source = open_segmentation(str(tmp_path), "cityscapes", "val")
    assert source.name(0) == image.relative_to(tmp_path).as_posix()
    assert source.read(0)[1][5].tolist() == [0, 18, 255, 11, 2, 255, 255, 255, 255, 10]
    assert (len(source), len(source.classes), source.resize) == (4, 19, (512, 1024))
    assert (source.classes[0], source.classes[11], source.classes[18]) == ("road", "person", "bicycle")
    assert (source.palette.shape, source.palette.dtype) == ((19, 3), np.uint8)
    assert (tuple(source.palette[0]), tuple(source.palette[18])) == ((128, 64, 128), (119, 11, 32))
    names = [source.name(number) for number in range(4)]
    assert names == sorted(names)
    assert all(name.startswith(("leftImg8bit/val/lindau/", "leftImg8bit/val/munster/")) for name in names)


def test_cityscapes_lists_what_has_no_mask_and_leaves_other_files_alone(tmp_path):
    write_cityscapes(tmp_path)
    (tmp_path / "gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png").unlink()
    (tmp_path / "leftImg8bit/train/ulm/notes.txt").write_text("mine")
    source = open_segmentation(str(tmp_path), "cityscapes", "train")
    mask = "gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png"
    assert source.skipped == [("leftImg8bit/train/ulm/ulm_000001_000019_leftImg8bit.png", f"no mask {mask}")]
    assert len(source) == 3


def test_cityscapes_that_is_not_there_is_no_archive_to_unpack(tmp_path):
    for name in ("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"^--data {tmp_path}: has no folder leftImg8bit/val; expected leftImg8bit/val/CITY"):
        open_segmentation(str(tmp_path), "cityscapes", "val")
    write_cityscapes(tmp_path)
    (tmp_path / "leftImg8bit/val/readme.txt").write_text("")
    with pytest.raises(UserError, match=r"readme\.txt.*expected leftImg8bit/val/CITY"):
        open_segmentation(str(tmp_path), "cityscapes", "val")
    shutil.rmtree(tmp_path / "gtFine/val")
    with pytest.raises(UserError, match="has no folder gtFine/val"):
        open_segmentation(str(tmp_path), "cityscapes", "val")


# --- views


@pytest.mark.parametrize("crop", [(33, 47), (64, 64), (7, 101), (1, 1)])
@pytest.mark.parametrize("resize", [None, (31, 59)])
def test_views_have_exactly_the_crop_s_size(crop, resize):
    image, mask = pair((45, 37))
    make = view(crop, resize=resize)
    for place in range(12):
        found = make(Image.fromarray(image), mask, Draw(0, place, 0))
        assert (found["images"].shape, found["images"].dtype) == ((3, *crop), torch.uint8)
        assert (found["masks"].shape, found["masks"].dtype) == (crop, torch.uint8)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("changes", [{}, {"horizontal_flip": 1.0}, {"scales": (0.3, 0.9)}, {"scales": (1.3, 3.0)}])
def test_picture_and_mask_stay_aligned_to_the_pixel(axis, changes):
    # A single step from dark to bright: after any resize a pixel is bright exactly when its centre lies past the step, which
    # a mask sampled at the pixels' corners would miss by up to a pixel.
    mask = np.zeros((90, 90), dtype=np.uint8)
    (mask if axis else mask.T)[:, 41:] = 1
    image = Image.fromarray(np.repeat(mask[..., None] * 200 + 20, 3, axis=2).astype(np.uint8))
    make = view((64, 80), **{"colour": False, "largest_class_share": 1.0, **changes})
    seen = 0
    for place in range(30):
        found = make(image, mask, Draw(1, place, 0))
        inside = found["masks"] != IGNORED
        bright, exact = found["images"][0].int() > 120, found["images"][0].int() == 120  # 120: the centre is on the step
        assert torch.equal(bright[inside & ~exact], (found["masks"] == 1)[inside & ~exact])
        seen += len(found["masks"][inside].unique()) == 2
    assert seen > 5


def test_every_augmentation_at_once_keeps_colours_on_their_classes():
    # Each class has one colour; photometric distortion maps a colour of a picture to another one, but for rounding.
    rng = np.random.default_rng(0)
    mask = np.kron(rng.integers(0, 3, (6, 8)), np.ones((16, 16))).astype(np.uint8)
    image = Image.fromarray(np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200)], dtype=np.uint8)[mask])
    make = view((64, 64))
    for place in range(30):
        found = make(image, mask, Draw(0, place, 0))
        labels = found["masks"].float()[None, None]
        most = torch.nn.functional.max_pool2d(labels, 7, stride=1, padding=3)
        least = -torch.nn.functional.max_pool2d(-labels, 7, stride=1, padding=3)
        inner = (most == least)[0, 0] & (found["masks"] != IGNORED)
        inner[[0, 1, 2, -3, -2, -1]] = inner[:, [0, 1, 2, -3, -2, -1]] = False  # what mixes in beyond the crop is not seen
        for number in found["masks"][inner].unique():
            colours = found["images"][:, inner & (found["masks"] == number)].int()
            assert (colours.amax(1) - colours.amin(1)).max() <= 2
    assert inner.any()


def test_a_view_without_chance_is_the_picture_resized_as_pillow_does():
    image, mask = pair((40, 40))
    found = view((64, 64), **PLAIN)(Image.fromarray(image), mask, Draw(0, 0, 0))
    pillow = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(found["images"].permute(1, 2, 0).numpy() - pillow).max() <= 1
    np.testing.assert_array_equal(found["masks"], Image.fromarray(mask).resize((64, 64), Image.Resampling.NEAREST))


def test_what_lies_beyond_the_picture_is_black_and_ignored():
    image, mask = pair((30, 40))
    found = view((64, 80), **{**PLAIN, "scales": (0.5, 0.5), "colour": True})(
        Image.fromarray(image.clip(50)), mask, Draw(0, 0, 0)
    )
    # The short side, 30, is fitted to 64, so the picture to 64x85; half of that is 32x42.
    ignored = found["masks"] == IGNORED
    assert not ignored[:32, :42].any()
    assert ignored[32:].all()
    assert ignored[:, 42:].all()
    assert not found["images"][:, ignored].any()
    assert found["images"][:, :32, :42].any(0).all()


def test_scales_are_drawn_evenly():
    image, mask = pair((32, 32))
    make = view((100, 100), **{**PLAIN, "scales": (0.5, 1.0)})
    heights = [int((make(Image.fromarray(image), mask, Draw(0, n, 0))["masks"][:, 0] != IGNORED).sum()) for n in range(500)]
    assert min(heights) in range(50, 53)
    assert max(heights) in range(98, 101)
    assert abs(np.mean(heights) - 75) < 2  # drawn evenly by its logarithm it would be 72
    assert abs(np.std(heights) - 50 / 12**0.5) < 1.5


def test_a_mirror_turns_both():
    image, mask = pair((50, 60))
    straight, mirrored = (
        view((32, 32), **{**PLAIN, "horizontal_flip": chance})(Image.fromarray(image), mask, Draw(0, 3, 0))
        for chance in (0.0, 1.0)
    )
    assert torch.equal(mirrored["images"], straight["images"].flip(2))
    assert torch.equal(mirrored["masks"], straight["masks"].flip(1))
    assert not torch.equal(mirrored["masks"], straight["masks"])
    coins = [
        torch.equal(
            view((32, 32), **{**PLAIN, "horizontal_flip": 0.5})(Image.fromarray(image), mask, Draw(0, n, 0))["masks"],
            view((32, 32), **PLAIN)(Image.fromarray(image), mask, Draw(0, n, 0))["masks"],
        )
        for n in range(60)
    ]
    assert 15 < sum(coins) < 45


def test_colours_change_the_picture_and_never_the_mask():
    image, mask = pair((50, 60))
    changed = 0
    for place in range(10):
        plain, coloured = (
            view((32, 32), colour=colour)(Image.fromarray(image), mask, Draw(0, place, 0)) for colour in (False, True)
        )
        assert torch.equal(plain["masks"], coloured["masks"])
        changed += not torch.equal(plain["images"], coloured["images"])
    assert changed >= 8


def largest_share(masks: torch.Tensor) -> float:
    counts = torch.bincount(masks.flatten(), minlength=256)[:IGNORED].double()
    return float(counts.max() / counts.sum()) if counts.sum() else 1.0


def test_crops_of_nearly_one_class_are_drawn_again():
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, 40:] = 1
    mask[np.arange(64) % 8 != 0] = IGNORED  # seven pixels of eight, and no share of any class
    image = Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8))

    def shares(limit: float) -> np.ndarray:
        make = view((16, 16), resize=(64, 64), **{**PLAIN, "largest_class_share": limit})
        return np.array([largest_share(make(image, mask, Draw(0, n, 0))["masks"]) for n in range(200)])

    # Both classes fill a quarter at least in 9 of the 49 places across, and 11 draws find one of these in 89 of 100 cases.
    assert 0.05 < (shares(1.0) <= 0.75).mean() < 0.3
    assert 0.7 < (shares(0.75) <= 0.75).mean() < 1


def test_a_picture_of_one_class_is_shown_all_the_same():
    found = view((16, 16))(Image.new("RGB", (20, 20)), np.zeros((20, 20), dtype=np.uint8), Draw(0, 0, 0))
    assert found["masks"].shape == (16, 16)


def test_a_view_depends_on_seed_and_draw_alone():
    image, mask = pair((50, 60))
    draws = [Draw(0, 5, 0), Draw(1, 5, 0), Draw(0, 6, 0), Draw(0, 5, 1)]
    make = view((32, 32))
    expected = [make(Image.fromarray(image), mask, draw) for draw in draws]
    random.seed(3)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    again = [make(Image.fromarray(image), mask, draw) for draw in reversed(draws)][::-1]
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(expected, again, strict=True):
        assert torch.equal(one["images"], other["images"])
        assert torch.equal(one["masks"], other["masks"])
    others = [*again[1:], view((32, 32), seed=1)(Image.fromarray(image), mask, draws[0])]
    assert not any(torch.equal(expected[0]["images"], other["images"]) for other in others)


@pytest.mark.parametrize(
    ("size", "crop", "resize", "expected"),
    [
        ((480, 640), (512, 512), None, (512, 683)),
        ((640, 480), (512, 512), None, (683, 512)),
        ((100, 300), (512, 1024), None, (512, 1536)),
        ((1024, 2048), (512, 512), (512, 1024), (512, 1024)),
        ((10, 1000), (512, 512), None, (20, 2048)),  # no longer than four times the crop's short side
        ((1, 5000), (64, 64), None, (1, 256)),
        ((3, 3), (1, 9), None, (1, 1)),
    ],
)
def test_pictures_are_fitted_by_their_short_side(size, crop, resize, expected):
    assert fitted_size(size, crop, resize) == expected


@pytest.mark.parametrize("resize", [None, (24, 48)])
def test_an_evaluation_sees_the_whole_picture(resize):
    image, _ = pair((30, 41))
    found = evaluation_view(Image.fromarray(image), (32, 40), resize)
    height, width = resize or (32, 44)
    pillow = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    assert found.dtype == torch.uint8
    assert np.abs(found.permute(1, 2, 0).numpy() - pillow).max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": (2.0, 0.5)}, "--scales 2.0 0.5: must be two numbers above 0"),
        ({"scales": (0.0, 1.0)}, "--scales"),
        ({"scales": (1.0, float("inf"))}, "--scales"),
        ({"horizontal_flip": 1.5}, "--horizontal-flip 1.5: must be in"),
        ({"largest_class_share": 0.0}, "--largest-class-share 0.0: must be in"),
        ({"largest_class_share": 1.1}, "--largest-class-share"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        SegmentationViewConfig(**changes)


def test_a_crop_without_pixels_is_refused():
    with pytest.raises(UserError, match="--crop 0x16: must be at least 1x1"):
        view((0, 16))


# --- datasets and loaders


def batches(folder: Path, workers: int) -> list[dict[str, torch.Tensor]]:
    source = open_segmentation(str(folder), "folder", "train")
    dataset = SegmentationTrainingSet(source, view((24, 32)), SkippedList(None))
    sampler = StepSampler(first=0, last=3, images=len(dataset), batch_size=4, repeats=1, seed=0)
    return list(training_loader(dataset, sampler, num_workers=workers, pin_memory=False))


def test_training_batches_are_the_same_in_any_number_of_processes(tmp_path):
    write_folder(tmp_path, pictures=5)
    alone, shared = batches(tmp_path, 0), batches(tmp_path, 2)
    assert alone[0]["images"].shape == (4, 3, 24, 32)
    assert alone[0]["masks"].shape == (4, 24, 32)
    assert len(alone) == len(shared) == 3
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one["images"], other["images"])
        assert torch.equal(one["masks"], other["masks"])


def test_training_goes_on_with_the_next_picture_and_lists_what_was_passed_over(tmp_path):
    source = open_segmentation(str(write_folder(tmp_path / "data")), "folder", "train")
    skipped = SkippedList(tmp_path / "skipped.txt")
    dataset = SegmentationTrainingSet(source, view((48, 64), **PLAIN), skipped)
    truncated(tmp_path / "data/images/train/03.png")
    Image.new("L", (64, 48), 7).save(tmp_path / "data/masks/train/00.png")
    assert len(dataset) == 4
    found = dataset[Draw(0, 3, 0)]
    np.testing.assert_array_equal(found["masks"], source.read(1)[1])
    names = [line.split("\t")[0] for line in skipped.tidy()]
    assert names == ["images/train/00.png", "images/train/03.png"]
    for file in (tmp_path / "data/masks/train").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="none of the images can be read"):
        dataset[Draw(0, 0, 0)]


def test_an_evaluation_counts_each_picture_once(tmp_path):
    write_folder(tmp_path / "data", pictures=5, size=(30, 41))
    source = open_segmentation(str(tmp_path / "data"), "folder", "val")
    Image.new("RGB", (41, 30)).save(tmp_path / "data/masks/val/01.png")
    skipped = SkippedList(tmp_path / "skipped.txt")
    dataset = SegmentationEvaluationSet(source, (32, 40), skipped)
    found = [list(evaluation_loader(dataset, batch_size=2, num_workers=workers)) for workers in (0, 2)]
    assert len(skipped.tidy()) == 1
    for lists in found:
        assert [len(items) for items in lists] == [2, 2, 1]
        items = [item for items in lists for item in items]
        assert [item["number"] for item in items] == list(range(5))
        assert set(items[1]) == {"number", "problem"}
        assert items[1]["problem"].startswith("mask masks/val/01.png: is a PNG of mode RGB")
        for item in (items[0], *items[2:]):
            image, mask = source.read(item["number"])
            assert set(item) == {"image", "mask", "number"}
            assert torch.equal(item["image"], evaluation_view(image, (32, 40), None))
            assert item["image"].shape == (3, 32, 44)
            np.testing.assert_array_equal(item["mask"], mask)


def test_cityscapes_is_evaluated_at_its_own_size(tmp_path):
    source = open_segmentation(str(write_cityscapes(tmp_path, pictures=2, size=(48, 70))), "cityscapes", "val")
    item = SegmentationEvaluationSet(source, (512, 512), SkippedList(None))[0]
    assert item["image"].shape == (3, 512, 1024)
    assert item["mask"].shape == (48, 70)
