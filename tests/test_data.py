"""Pictures: every kind of file, what is passed over, the stateless order of a run, views that depend on their draw alone."""

import io
import pickle
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vit_linearizer.contracts import UserError
from vit_linearizer.data.datasets import (
    CentreSet,
    SkippedList,
    TrainingSet,
    centre_loader,
    split_held_out,
    to_device,
    training_loader,
)
from vit_linearizer.data.images import EXTENSIONS, UnreadableImageError, read_image, scan_folder
from vit_linearizer.data.sampler import Draw, StepSampler, global_batch, steps_per_epoch
from vit_linearizer.data.sources import DigitsSource, FolderSource, open_source
from vit_linearizer.data.views import MaskConfig, TrainingView, ViewConfig, centre_transform
from vit_linearizer.evaluation import class_scores, collect_features
from vit_linearizer.objectives import masked_count

RED, GREEN, BLUE, YELLOW = (250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)


def quadrants(height: int = 16, width: int = 32) -> np.ndarray:
    """Four colours, one a quadrant: no flip and no turn of it looks the same."""
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[: height // 2, : width // 2], picture[: height // 2, width // 2 :] = RED, GREEN
    picture[height // 2 :, : width // 2], picture[height // 2 :, width // 2 :] = BLUE, YELLOW
    return picture


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def pixels(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# --- reading

#: How to save with the least loss. Colours of a jpg at full resolution: no fringes between the quadrants.
BEST = {".jpg": {"quality": 95, "subsampling": 0}, ".jpeg": {"quality": 95, "subsampling": 0}, ".webp": {"lossless": True}}


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_extension_is_read(tmp_path, extension):
    path = tmp_path / f"picture{extension}"
    Image.fromarray(quadrants()).save(path, **BEST.get(extension, {}))
    assert np.abs(pixels(path) - quadrants()).max() <= (2 if extension in (".jpg", ".jpeg") else 0)


#: How a picture with each EXIF orientation lies in its file, by the standard's words for rows and columns.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],  # first column is the right side
    3: lambda upright: upright[::-1, ::-1],  # upside down
    4: lambda upright: upright[::-1],  # first row is the bottom
    5: lambda upright: upright.swapaxes(0, 1),  # first row is the left side, first column the top
    6: lambda upright: upright.swapaxes(0, 1)[::-1],  # first row is the right side, first column the top
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],  # first row is the right side, first column the bottom
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],  # first row is the left side, first column the bottom
}


@pytest.mark.parametrize("extension", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(tmp_path, orientation, extension):
    path = tmp_path / f"photo{extension}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = STORED[orientation](quadrants())
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **BEST.get(extension, {}))
    found = pixels(path)
    assert found.shape == quadrants().shape
    assert np.abs(found - quadrants()).max() <= (2 if extension == ".jpg" else 0)


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putdata([0, 1])
    image.info["transparency"] = 1
    return image


def black_as_transparent() -> Image.Image:
    image = from_bytes("RGB", [0, 0, 0, *BLUE])
    image.info["transparency"] = (0, 0, 0)
    return image


def grey16(values: list[int]) -> Image.Image:
    return Image.fromarray(np.array([values], dtype=np.uint16))


def floats(values: list[float]) -> Image.Image:
    return Image.fromarray(np.array([values], dtype=np.float32))


def from_bytes(mode: str, values: list[int]) -> Image.Image:
    """A picture of one row."""
    return Image.frombytes(mode, (len(values) // len(mode), 1), bytes(values))


#: Kind of file, a picture of one row, and the pixels that must come out.
MODES = {
    "grey": ("png", lambda: from_bytes("L", [0, 128, 255]), [(0,) * 3, (128,) * 3, (255,) * 3]),
    "grey with alpha": ("png", lambda: from_bytes("LA", [10, 255, 10, 0, 0, 128]), [(10,) * 3, (255,) * 3, (127,) * 3]),
    "colour with alpha": (
        "png",
        lambda: from_bytes("RGBA", [200, 0, 0, 255, 200, 0, 0, 0, 0, 0, 0, 51]),
        [(200, 0, 0), (255, 255, 255), (204, 204, 204)],
    ),
    "colour, one of them transparent": ("png", black_as_transparent, [(255, 255, 255), BLUE]),
    "palette": ("bmp", lambda: palette_with_transparency().convert("RGB").quantize(4), [RED, GREEN]),
    "palette, one colour transparent": ("png", palette_with_transparency, [RED, (255, 255, 255)]),
    "ink": (
        "tif",
        lambda: from_bytes("CMYK", [0, 0, 0, 0, 0, 255, 255, 0, 0, 0, 0, 255]),
        [(255,) * 3, (255, 0, 0), (0,) * 3],
    ),
    "16-bit grey": ("png", lambda: grey16([0, 257, 32768, 65535]), [(0,) * 3, (1,) * 3, (128,) * 3, (255,) * 3]),
    "16-bit grey, dark": ("png", lambda: grey16([0, 200]), [(0,) * 3, (1,) * 3]),
    "16-bit grey tif": ("tif", lambda: grey16([0, 65535]), [(0,) * 3, (255,) * 3]),
    "float in [0, 1]": ("tif", lambda: floats([0, 0.5, 1]), [(0,) * 3, (128,) * 3, (255,) * 3]),
    "float in [0, 255]": ("tif", lambda: floats([0, 127.4, 255]), [(0,) * 3, (127,) * 3, (255,) * 3]),
    "float beyond": ("tif", lambda: floats([-3, 0.2, 0.8]), [(0,) * 3, (51,) * 3, (204,) * 3]),
    "black and white": ("png", lambda: from_bytes("L", [0, 255]).convert("1"), [(0,) * 3, (255,) * 3]),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_8_bit_rgb(tmp_path, name):
    kind, make, expected = MODES[name]
    path = tmp_path / f"picture.{kind}"
    make().save(path)
    assert [tuple(pixel) for pixel in pixels(path)[0]] == expected


def test_ink_in_a_jpg_is_not_inverted(tmp_path):
    path = tmp_path / "print.jpg"
    Image.fromarray(quadrants()).convert("CMYK").save(path, quality=95)
    assert np.abs(pixels(path) - quadrants()).max() <= 40


BROKEN = {
    "truncated.jpg": lambda: encoded(noise(0), "JPEG")[:1000],
    "truncated.png": lambda: encoded(noise(0), "PNG")[:1500],
    "empty.jpg": lambda: b"",
    "text.jpg": lambda: b"these are words, not pixels\n" * 20,
    "header_only.jpg": lambda: b"\xff\xd8\xff\xe0\x00\x10JFIF",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_reported_in_one_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BROKEN[name]())
    with pytest.raises(UnreadableImageError, match=r"^\w+: .+") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 200


def test_a_missing_file_is_unreadable(tmp_path):
    with pytest.raises(UnreadableImageError, match="FileNotFoundError"):
        read_image(tmp_path / "gone.jpg")


# --- scanning a folder


def write(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed).save(path)


def test_scan_is_recursive_sorted_and_deaf_to_case(tmp_path):
    for name in ("b/deep/er/1.png", "b/a.JPG", "a/2.jpg", "a/10.Jpeg", "Z.PNG", "z.webp", "c.TIFF"):
        write(tmp_path / name)
    for name in ("readme.txt", "a/picture.gif", "a/noextension", "jpg"):
        (tmp_path / name).write_text("no image")
    found, skipped = scan_folder(tmp_path)
    expected = ["Z.PNG", "a/10.Jpeg", "a/2.jpg", "b/a.JPG", "b/deep/er/1.png", "c.TIFF", "z.webp"]
    assert [path.as_posix() for path in found] == expected
    assert skipped == []


def test_scan_passes_over_hidden_files_and_folders(tmp_path):
    for name in ("seen.png", ".hidden.png", ".cache/thumbnail.png", "album/.trash/old.png"):
        write(tmp_path / name)
    assert scan_folder(tmp_path)[0] == [Path("seen.png")]


def test_scan_lists_what_it_skips_with_the_reason(tmp_path):
    write(tmp_path / "good.png")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/text.jpg").write_bytes(BROKEN["text.jpg"]())
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "broken_link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    found, skipped = scan_folder(tmp_path)
    assert found == [Path("good.png")]
    assert [path.as_posix() for path, _ in skipped] == ["broken_link.jpg", "empty.png", "sub/text.jpg"]
    reasons = [reason.partition(":")[0] for _, reason in skipped]
    assert reasons == ["FileNotFoundError", "UnidentifiedImageError", "UnidentifiedImageError"]


@pytest.mark.parametrize("loop", ["data/loop", "outside/loop"])
def test_scan_follows_links_once_and_ends_in_loops(tmp_path, loop):
    write(tmp_path / "outside/linked.png")
    write(tmp_path / "data/own.png")
    (tmp_path / "data/more").symlink_to(tmp_path / "outside", target_is_directory=True)
    (tmp_path / loop).symlink_to(tmp_path / "data", target_is_directory=True)
    found, skipped = scan_folder(tmp_path / "data")
    assert sorted(found) == found
    assert sorted(path.name for path in found) == ["linked.png", "own.png"]
    assert Path("own.png") in found
    assert skipped == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, r"no such folder; give a folder of images, or builtin:digits$"),
        (lambda folder: folder.mkdir(), r"holds no images; expected \.jpg .*\.tiff files, in any depth of folders$"),
        (
            lambda folder: (folder.mkdir(), [(folder / name).write_bytes(b"no") for name in ("a.jpg", "b.png")]),
            r"none of its 2 image files can be read; expected \.jpg ",
        ),
    ],
    ids=["missing", "empty", "broken"],
)
def test_a_folder_without_images_is_refused_in_words(tmp_path, make, message):
    folder = tmp_path / "pictures"
    make(folder)
    with pytest.raises(UserError, match=f"^--data {re.escape(str(folder))}: {message}"):
        scan_folder(folder)


def test_a_file_is_no_folder(tmp_path):
    write(tmp_path / "one.png")
    with pytest.raises(UserError, match="no such folder"):
        open_source(str(tmp_path / "one.png"))


# --- files that turn out broken during training


def make_training_set(source, *, skipped: SkippedList | None = None, mask: MaskConfig | None = None, seed: int = 0):
    view = TrainingView((16, 24), ViewConfig(augmentation="three"), mask, seed=seed)
    return TrainingSet(source, np.arange(len(source)), view, skipped or SkippedList(None))


@pytest.fixture
def half_broken(tmp_path) -> FolderSource:
    """Files 1, 2 and 4 of 0 to 4 have a good header and half a body."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        content = encoded(noise(number), "PNG")
        (folder / f"{number}.png").write_bytes(content[: len(content) // 2] if number in (1, 2, 4) else content)
    return FolderSource(folder)


def test_a_broken_body_passes_the_scan(half_broken):
    assert len(half_broken) == 5
    assert half_broken.skipped == []


def test_broken_pictures_are_left_out_of_an_evaluation_and_listed(half_broken, tmp_path):
    """A score in which the next picture stood in for a broken one would count that one twice."""
    skipped = SkippedList(tmp_path / "skipped.txt")
    centre = CentreSet(half_broken, range(5), (16, 24), skipped=skipped)
    for number in (0, 1, 2, 3, 4, 1):
        item = centre[number]
        assert (item is None) == (number in (1, 2, 4))
        if item is not None:
            assert torch.equal(item["images"], centre.transform(half_broken.read(number)))
            assert item["numbers"] == number
    lines = (tmp_path / "skipped.txt").read_text().splitlines()
    assert [line.partition("\t")[0] for line in lines] == ["1.png", "2.png", "4.png"]
    assert all(line.partition("\t")[2] for line in lines)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_the_centre_loader_gives_every_readable_picture_once_in_order(half_broken, batch_size):
    """A batch of which nothing can be read is passed over."""
    centre = CentreSet(half_broken, [4, 3, 2, 1, 0], (16, 24))
    batches = list(centre_loader(centre, batch_size=batch_size))
    assert torch.cat([batch["numbers"] for batch in batches]).tolist() == [3, 0]
    assert all(len(batch["images"]) == len(batch["numbers"]) > 0 for batch in batches)


def test_replacement_in_training_is_the_same_in_every_process(half_broken, tmp_path):
    first = make_training_set(half_broken, skipped=SkippedList(tmp_path / "skipped.txt"))
    second = make_training_set(half_broken)
    draw = Draw(0, 1, 2)
    for _ in range(2):
        assert torch.equal(first[draw]["images"], second[draw]["images"])
    assert torch.equal(first[draw]["images"], first.view(half_broken.read(3), draw)["images"])
    assert [line.partition("\t")[0] for line in first.skipped.tidy()] == ["1.png", "2.png"]


def test_nothing_but_broken_pictures_ends_a_training_in_words(half_broken):
    training = make_training_set(half_broken)
    training.numbers = np.array([1, 2, 4])
    with pytest.raises(UserError, match=r"^--data 2\.png: none of the images can be read; see skipped\.txt"):
        training[Draw(0, 1, 0)]


@pytest.mark.parametrize("numbers", [[1, 2, 4], []], ids=["broken", "none"])
def test_nothing_but_broken_pictures_end_an_evaluation_in_words(half_broken, numbers):
    """The loader gives nothing, as to a process without a share; whoever needs a picture says so."""
    loader = centre_loader(CentreSet(half_broken, numbers, (16, 24)), batch_size=2)
    assert list(loader) == []
    assert loader.read == 0
    for measure in (class_scores, collect_features):
        with pytest.raises(UserError, match=r"^--data held-out images: none of them can be read"):
            measure(torch.nn.Identity(), loader, torch.device("cpu"))


def test_labels_follow_the_picture_that_is_shown():
    class Patchy(DigitsSource):
        """Digits of which the first is broken."""

        def read(self, index):
            if index == 0:
                raise UnreadableImageError("OSError: broken")
            return super().read(index)

    source = Patchy("test")
    assert source.labels[0] != source.labels[1]
    centre = CentreSet(source, np.arange(len(source)), (32, 32))
    assert centre[0] is None
    assert centre[1]["labels"] == source.labels[1]
    assert make_training_set(source)[Draw(0, 0, 0)]["labels"] == source.labels[1]


def test_skipped_list_is_sorted_and_without_repetition(tmp_path):
    path = tmp_path / "skipped.txt"
    writers = [SkippedList(path), SkippedList(path)]  # two workers
    for name in ("b.jpg", "a.jpg", "b.jpg"):
        for writer in writers:
            writer.add(name, "OSError: broken")
    assert len(path.read_text().splitlines()) == 4  # each worker once
    expected = ["a.jpg\tOSError: broken", "b.jpg\tOSError: broken"]
    assert writers[0].tidy() == expected
    assert path.read_text().splitlines() == expected
    assert SkippedList(tmp_path / "none.txt").tidy() == []
    assert not (tmp_path / "none.txt").exists()


# --- the sampler


def flat(batches: list[list[Draw]]) -> list[Draw]:
    return [draw for batch in batches for draw in batch]


def run(first: int = 0, last: int = 12, **changes) -> list[list[Draw]]:
    values = {"images": 24, "batch_size": 8, "repeats": 1, "seed": 5, **changes}
    sampler = StepSampler(first=first, last=last, **values)
    batches = list(sampler)
    assert len(sampler) == len(batches)
    return batches


def test_order_depends_on_seed_and_epoch_alone():
    np.random.seed(0)
    first = run()
    np.random.seed(1)
    assert run() == first
    assert run(seed=6) != first
    epochs = [[draw.place for batch in first[start : start + 3] for draw in batch] for start in (0, 3, 6)]
    assert len({tuple(order) for order in epochs}) == 3
    assert [batch[0].epoch for batch in first] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def test_every_picture_exactly_once_an_epoch():
    for epoch in range(4):
        draws = flat(run(first=3 * epoch, last=3 * epoch + 3))
        assert sorted(draw.place for draw in draws) == list(range(24))
        assert {draw.repeat for draw in draws} == {0}


@pytest.mark.parametrize(("images", "batch_size"), [(10, 4), (3, 8), (1, 4), (25, 8)])
def test_the_last_batch_is_filled_up_with_other_views(images, batch_size):
    steps = steps_per_epoch(images, batch_size)
    assert (steps - 1) * batch_size < images <= steps * batch_size
    batches = run(last=steps, images=images, batch_size=batch_size)
    assert {len(batch) for batch in batches} == {batch_size}
    draws = flat(batches)
    assert sorted(draw.place for draw in draws[:images]) == list(range(images))
    assert all(draw.epoch == 0 for draw in draws)
    assert len(set(draws)) == len(draws)  # no view stands twice in an epoch


def test_repeats_show_each_picture_so_often_in_a_row():
    draws = flat(run(last=3, repeats=3))
    assert len(draws) == 24
    for start in range(0, 24, 3):
        three = draws[start : start + 3]
        assert len({draw.place for draw in three}) == 1
        assert [draw.repeat for draw in three] == [0, 1, 2]
    once = [draw.place for draw in flat(run(last=1))]
    assert [draw.place for draw in draws[::3]] == once  # the epoch's order, seen three times more slowly
    assert len(set(once)) == 8


def test_repeats_never_draw_the_same_view_twice_in_an_epoch():
    draws = flat(run(last=1, images=2, batch_size=8, repeats=3))
    assert len(set(draws)) == 8
    assert Counter(draw.place for draw in draws).most_common()[0][1] <= 5


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("repeats", [1, 3])
def test_shares_of_the_processes_interleave_to_the_batch_of_one(processes, repeats):
    whole = run(repeats=repeats)
    shares = [run(repeats=repeats, process=process, processes=processes) for process in range(processes)]
    assert [[draw for group in zip(*parts, strict=True) for draw in group] for parts in zip(*shares, strict=True)] == whole


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 2), (1, 8), (2, 2), (2, 4)])
def test_accumulated_parts_make_up_the_share(processes, accumulation):
    place = {"process": processes - 1, "processes": processes}
    parts = run(**place, accumulation=accumulation)
    assert len(parts) == 12 * accumulation
    assert {len(part) for part in parts} == {8 // processes // accumulation}
    together = [flat(parts[start : start + accumulation]) for start in range(0, len(parts), accumulation)]
    assert together == run(**place)


@pytest.mark.parametrize("first", [1, 3, 7, 12])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_that_begins_later_is_the_tail_of_the_whole(first, accumulation):
    whole = run(repeats=3, accumulation=accumulation)
    assert run(first=first, repeats=3, accumulation=accumulation) == whole[first * accumulation :]


def test_a_batch_is_a_function_of_its_step():
    values = {"images": 10, "batch_size": 4, "repeats": 2, "seed": 3}
    backwards = [global_batch(step, **values) for step in reversed(range(9))]
    assert backwards[::-1] == [global_batch(step, **values) for step in range(9)]


@pytest.mark.parametrize(("processes", "accumulation"), [(3, 1), (1, 3), (4, 4)])
def test_a_batch_that_does_not_divide_is_refused(processes, accumulation):
    with pytest.raises(ValueError, match=f"batch 8 .*{processes} processes x {accumulation} accumulations"):
        run(processes=processes, accumulation=accumulation)


# --- views

MASK = MaskConfig(grid=(2, 3), ratio=0.5, masking="token")


def make_view(augmentation: str = "three", *, mask: MaskConfig | None = MASK, seed: int = 0) -> TrainingView:
    return TrainingView((16, 24), ViewConfig(augmentation=augmentation), mask, seed=seed)


def set_global_seeds(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("augmentation", ["three", "crop", "none"])
def test_a_view_depends_on_its_draw_and_not_on_global_generators(augmentation):
    for index in range(6):
        views = []
        for seed in (1, 2):
            set_global_seeds(seed)
            views.append(make_view(augmentation)(noise(index), Draw(1, index, 2)))
        assert same(*views)


def test_views_leave_the_global_generators_alone():
    set_global_seeds(3)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    for index in range(10):
        make_view()(noise(index), Draw(0, index, 0))
    assert random.getstate() == before[0]
    for now, then in zip(np.random.get_state(), before[1], strict=True):
        assert np.array_equal(now, then)
    assert torch.equal(torch.get_rng_state(), before[2])


def test_every_generator_that_a_transform_may_use_follows_the_draw():
    """timm's transforms draw from ``random`` and torch today; NumPy's generator is seeded for those of tomorrow."""
    view = make_view(mask=None)
    view.transform = lambda image: (random.random(), np.random.rand(), torch.rand(()).item())
    numbers = [[view(noise(0), Draw(0, index, 0))["images"] for index in (0, 1)] for _ in range(2)]
    assert numbers[0] == numbers[1]
    assert all(first != second for first, second in zip(*numbers[0], strict=True))


def test_global_generators_are_given_back_when_a_transform_fails():
    view = make_view()

    def fail(image):
        random.random()
        raise RuntimeError("no")

    view.transform = fail
    set_global_seeds(3)
    before = random.getstate()
    with pytest.raises(RuntimeError, match="no"):
        view(noise(0), Draw(0, 0, 0))
    assert random.getstate() == before


@pytest.mark.parametrize("field", ["epoch", "place", "repeat", "seed"])
def test_every_part_of_a_draw_and_the_seed_change_view_and_mask(field):
    """The same picture, twelve values of one number: as many pictures, and more than a few of the 20 possible masks."""
    images, masks = set(), set()
    for value in range(12):
        draw = Draw(**{"epoch": 0, "place": 0, "repeat": 0, **({field: value} if field != "seed" else {})})
        item = make_view(seed=value if field == "seed" else 0)(noise(0), draw)
        images.add(item["images"].numpy().tobytes())
        masks.add(item["mask"].numpy().tobytes())
    assert len(images) == 12
    assert len(masks) > 4


def test_views_have_the_size_asked_for_and_their_mask():
    for size in ((40, 30), (20, 90), (5, 5), (1, 1), (200, 1)):
        for augmentation in ("three", "crop", "none"):
            item = make_view(augmentation)(noise(0, size), Draw(0, 0, 0))
            assert item["images"].shape == (3, 16, 24)
            assert item["images"].dtype == torch.uint8
            assert item["mask"].shape == (6,) and item["mask"].dtype == torch.bool
            assert item["mask"].sum() == masked_count(6, 0.5)
    assert set(make_view(mask=None)(noise(0), Draw(0, 0, 0))) == {"images"}


def test_no_augmentation_is_the_centre_view():
    for seed in range(3):
        view = make_view("none", mask=None)(noise(seed), Draw(0, seed, 1))["images"]
        assert torch.equal(view, centre_transform((16, 24))(noise(seed)))


@pytest.mark.parametrize("size", [(16, 24), (24, 24), (8, 48)])
def test_the_centre_view_covers_and_cuts_the_centre(size):
    """A white field of the view's shape amid a longer black picture; a framed picture twice as large."""
    height, width = size
    for picture in (np.zeros((height * 2, width), np.uint8), np.zeros((height, width * 2), np.uint8)):
        top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
        picture[top : top + height, left : left + width] = 255
        view = centre_transform(size)(Image.fromarray(picture).convert("RGB"))
        assert view.shape == (3, height, width)
        assert (view == 255).all()
    framed = np.zeros((2 * height, 2 * width, 3), np.uint8)
    framed[:2], framed[-2:], framed[:, :2], framed[:, -2:] = RED, GREEN, BLUE, YELLOW
    view = centre_transform(size)(Image.fromarray(framed)).int()
    middles = [view[:, 0, width // 2], view[:, -1, width // 2], view[:, height // 2, 0], view[:, height // 2, -1]]
    for found, colour in zip(middles, (RED, GREEN, BLUE, YELLOW), strict=True):
        assert (found - torch.tensor(colour)).abs().max() < 60  # the frame is one pixel wide, and none of it is cut


def test_a_crop_view_shows_parts_and_mirror_images_and_no_other_colours():
    """Bands of two colours: crops differ, about half of them are mirrored, colours change only with ThreeAugment."""
    bands = np.zeros((40, 60, 3), np.uint8)
    bands[:, :30], bands[:, 30:] = RED, BLUE
    config = ViewConfig(augmentation="crop", smallest_crop=0.9, horizontal_flip=0.5)
    view = TrainingView((16, 24), config, None, seed=0)
    crops = [view(Image.fromarray(bands), Draw(0, index, 0))["images"] for index in range(100)]
    mirrored = sum(bool(crop[2, :, 0].float().mean() > 128) for crop in crops)
    assert 30 < mirrored < 70
    assert all(crop[1].max() == 0 for crop in crops)
    never = TrainingView((16, 24), ViewConfig(augmentation="crop", smallest_crop=0.9, horizontal_flip=0.0), None, seed=0)
    assert all(never(Image.fromarray(bands), Draw(0, index, 0))["images"][0, :, 0].min() > 128 for index in range(20))
    three = [make_view(mask=None)(Image.fromarray(bands), Draw(0, index, 0))["images"] for index in range(20)]
    assert any(crop[1].max() > 0 for crop in three)


def test_smallest_crop_bounds_the_share_that_is_kept():
    """A ramp from left to right: how much of its range a crop shows tells how large it was."""
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (200, 1))).convert("RGB")

    def spans(smallest: float) -> np.ndarray:
        config = ViewConfig(augmentation="crop", smallest_crop=smallest, horizontal_flip=0.0)
        view = TrainingView((24, 24), config, None, seed=0)
        return np.array([int(np.ptp(view(ramp, Draw(0, n, 0))["images"].numpy())) for n in range(60)])

    assert spans(0.8).min() > 140
    assert spans(0.08).min() < 100


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"smallest_crop": 0.0}, r"^--smallest-crop 0\.0: "),
        ({"smallest_crop": 1.5}, r"^--smallest-crop 1\.5: "),
        ({"horizontal_flip": -0.1}, r"^--horizontal-flip -0\.1: "),
        ({"horizontal_flip": 1.1}, r"^--horizontal-flip 1\.1: "),
        ({"repeats": 0}, r"^--repeats 0: "),
    ],
    ids=str,
)
def test_views_that_cannot_be_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        ViewConfig(**values)


# --- loaders


@pytest.fixture
def folder(tmp_path) -> FolderSource:
    for number in range(6):
        write(tmp_path / f"pictures/{number}.png", number)
    return FolderSource(tmp_path / "pictures")


def batches(source, *, num_workers: int) -> list[dict[str, torch.Tensor]]:
    sampler = StepSampler(first=1, last=4, images=len(source), batch_size=4, repeats=3, seed=0)
    dataset = make_training_set(source, mask=MASK)
    return list(training_loader(dataset, sampler, num_workers=num_workers, pin_memory=False))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with a single core
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # from Python 3.12 on
def test_workers_load_the_same_bits_as_the_main_process(folder):
    set_global_seeds(1)
    alone = batches(folder, num_workers=0)
    set_global_seeds(2)
    helped = batches(folder, num_workers=2)
    assert len(alone) == len(helped) == 3
    assert all(same(*pair) for pair in zip(alone, helped, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(alone[0]["images"], alone[1]["images"], strict=True))


def test_a_batch_has_the_promised_form(folder):
    batch = batches(folder, num_workers=0)[0]
    assert batch["images"].shape == (4, 3, 16, 24) and batch["images"].dtype == torch.uint8
    assert batch["mask"].shape == (4, 6) and batch["mask"].dtype == torch.bool


def test_a_training_set_can_be_sent_to_a_spawned_worker(folder):
    dataset = make_training_set(folder, mask=MASK)
    sent = pickle.loads(pickle.dumps(dataset))
    assert same(sent[Draw(0, 2, 1)], dataset[Draw(0, 2, 1)])


def test_centre_loader_gives_all_pictures_in_order_under_fixed_masks(folder):
    dataset = CentreSet(folder, [4, 0, 3, 1, 5], (16, 24), mask=MASK)
    first, second = (list(centre_loader(dataset, batch_size=2, num_workers=0)) for _ in range(2))
    assert [len(batch["images"]) for batch in first] == [2, 2, 1]
    assert all(same(*pair) for pair in zip(first, second, strict=True))
    images = torch.cat([batch["images"] for batch in first])
    for image, number in zip(images, (4, 0, 3, 1, 5), strict=True):
        assert torch.equal(image, dataset.transform(folder.read(number)))
    masks = torch.cat([batch["mask"] for batch in first])
    assert masks.sum(1).tolist() == [3] * 5
    assert len({tuple(mask.tolist()) for mask in masks}) > 1
    reordered = CentreSet(folder, [0, 4], (16, 24), mask=MASK)
    assert torch.equal(reordered[1]["mask"], masks[0])  # the mask belongs to the picture, not to its place


def test_to_device_turns_images_into_floats_from_0_to_1():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, -1, -1)
    batch = {"images": images, "mask": torch.tensor([[True, False]] * 2), "labels": torch.tensor([3, 4])}
    moved = to_device(batch, torch.device("cpu"))
    assert moved["images"].dtype == torch.float32
    torch.testing.assert_close(moved["images"][0, 0].flatten(), torch.arange(256) / 255)
    assert torch.equal(moved["mask"], batch["mask"]) and torch.equal(moved["labels"], batch["labels"])
    assert batch["images"] is images


# --- digits and the held-out part


@pytest.fixture(scope="module")
def digits() -> dict[str, DigitsSource]:
    return {name: open_source(name) for name in ("builtin:digits", "builtin:digits-train", "builtin:digits-test")}


def test_there_are_1797_digits_in_two_parts(digits):
    names = {split: [source.name(n) for n in range(len(source))] for split, source in digits.items()}
    whole, train, test = names.values()
    assert len(whole) == len(set(whole)) == 1797
    assert set(train).isdisjoint(test)
    assert sorted(train + test) == sorted(whole)


def test_digits_are_split_evenly_over_the_classes(digits):
    whole, test = (np.bincount(digits[name].labels, minlength=10) for name in ("builtin:digits", "builtin:digits-test"))
    assert np.abs(test - 0.2 * whole).max() <= 1


def test_digits_are_the_same_pictures_under_the_same_name_in_every_part(digits):
    whole = digits["builtin:digits"]
    places = {whole.name(number): number for number in range(len(whole))}
    for split in ("builtin:digits-train", "builtin:digits-test"):
        source = digits[split]
        for number in (0, len(source) // 2, len(source) - 1):
            original = places[source.name(number)]
            assert source.read(number).tobytes() == whole.read(original).tobytes()
            assert source.labels[number] == whole.labels[original]


def test_digits_are_rgb_pictures_of_32_by_32(digits):
    for number in range(0, 1797, 300):
        image = digits["builtin:digits"].read(number)
        assert image.mode == "RGB" and image.size == (32, 32)
        grey = np.asarray(image)
        assert np.ptp(grey, axis=2).max() == 0
        assert grey.max() > 200 and grey.min() < 50


def test_an_unknown_builtin_is_refused_with_a_hint():
    with pytest.raises(UserError, match=r"^--data builtin:digit: unknown built-in data; did you mean builtin:digits"):
        open_source("builtin:digit")


@pytest.mark.parametrize("images", [2, 3, 10, 100, 1000, 20_000])
def test_held_out_and_training_pictures_are_apart(images):
    train, held_out = split_held_out(images, seed=0)
    assert sorted([*train, *held_out]) == list(range(images))
    assert len(held_out) == min(512, max(1, round(images / 20)))
    assert np.array_equal(train, np.sort(train)) and np.array_equal(held_out, np.sort(held_out))
    again = split_held_out(images, seed=0)
    assert np.array_equal(again[0], train) and np.array_equal(again[1], held_out)
    if images > 10:
        assert not np.array_equal(split_held_out(images, seed=1)[1], held_out)


def test_a_single_picture_serves_as_both():
    train, held_out = split_held_out(1, seed=0)
    assert train.tolist() == held_out.tolist() == [0]
