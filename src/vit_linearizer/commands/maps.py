"""``maps``: models and pictures in, their activation maps side by side out, one sheet a picture."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from ..contracts import UserError
from ..data.datasets import to_device
from ..data.images import EXTENSIONS, UnreadableImageError, read_image
from ..data.picture_files import PictureFile, find_pictures
from ..data.views import centre_transform
from ..reporting.activation_maps import MapPanels, Query, common_query, has_class_token, map_panels, stages_shown
from ..reporting.map_sheet import View, draw_sheet
from ..training.machine import choose_device, choose_precision, termination_as_interrupt
from ..training.progress import ProgressLine, show_messages
from .maps_models import plan_models

logger = logging.getLogger("vit_linearizer")


@dataclass(frozen=True, kw_only=True)
class MapsConfig:
    """Draw what models see in pictures: which patches resemble a token, stage by stage, model beside model.

    Attributes:
        models: run folders, timm names, hf-hub:OWNER/NAME, local-dir:FOLDER or weight files; the first is what the others
            are compared with. A run of distill alone gets its teacher beside it, where that lies on this disk.
        images: files, and folders of images, searched recursively.
        out: the PNG; with several pictures the folder for NAME.png of each (maps.png then means maps/).
        models_arch: timm names of the architectures of weight files among the models, in their order.
        models_pretrained: load pretrained weights of timm names; --no-models-pretrained takes random ones.
        image_size: 224 or HEIGHTxWIDTH, of the first model; the others see the size where they have as many patches. By
            default the first model's nominal size.
        query: whose map: the class token, the mean patch token, or the patch under --point. By default the class token
            where all models have one and none answers with its mean patch token, else the mean.
        point: x,y in pixels of the pictures as they lie on disk (upright), from the upper left corner.
        stages: into how many each model is cut.
        at: which of them to show, from 1; by default all.
        view: heat (activation maps) and pca (colours of the final patch tokens).
        device: where to run.
        precision: arithmetic of the models; auto is bf16 where the device has it, else fp32.
        debug: show the traceback of an error.
    """

    models: tuple[str, ...]
    images: tuple[str, ...]
    out: str
    models_arch: tuple[str, ...] = ()
    models_pretrained: bool = True
    image_size: str | None = None
    query: Literal["class", "mean", "point"] | None = None
    point: str | None = None
    stages: int = 4
    at: tuple[int, ...] = ()
    view: tuple[View, ...] = ("heat",)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    debug: bool = False

    def __post_init__(self) -> None:
        for name in ("models", "images"):
            if isinstance(getattr(self, name), str):
                raise UserError(name, getattr(self, name), "give a list")
            if not getattr(self, name):
                raise UserError(f"--{name}", None, "name at least one")
        if len(set(self.models)) < len(self.models):
            raise UserError("--models", " ".join(self.models), "names a model twice")
        if self.stages < 1:
            raise UserError("--stages", self.stages, "must be at least 1")
        stages_shown(self.at, self.stages)
        if not self.view:
            raise UserError("--view", None, "choose heat, pca or both")
        if self.point is None and self.query == "point":
            raise UserError("--query", "point", "needs the point: --point X,Y")
        if self.point is not None:
            if self.query not in (None, "point"):
                raise UserError("--point", self.point, f"is not looked at with --query {self.query}; leave one out")
            parse_point(self.point)
        if Path(self.out).suffix.lower() in (set(EXTENSIONS) | {".pdf", ".svg", ".gif"}) - {".png"}:
            raise UserError("--out", self.out, "sheets are PNG files; give NAME.png or a folder")


def maps(config: MapsConfig) -> list[Path]:
    """Draw activation maps of models side by side; see `MapsConfig`.

    Pictures are resized to cover the image size and cut to its centre, as every evaluation does. A picture that cannot be
    read, or whose shown part does not hold the point, is passed over with a message.

    Returns:
        The files written, in the order of the pictures.

    Raises:
        UserError: anything in the configuration that cannot work, found before weights are loaded; or not one picture can
            be drawn.
    """
    show_messages()
    device = choose_device(config.device)
    precision = choose_precision(device.type)[0] if config.precision == "auto" else config.precision
    targets = _targets(config)
    size, grid, shown = plan_models(config)
    probes = {model.name: model.probe for model in shown}
    query = config.query or (common_query(probes.values()) if config.point is None else "point")
    for name, probe in probes.items():
        if query == "class" and not has_class_token(probe):
            raise UserError("--query", "class", f"{name} has no class token; use mean or point")
    point = None if config.point is None else parse_point(config.point)
    if point is not None:
        targets = _holding(point, size, targets)
    models = {model.name: model.open().to(device) for model in shown}
    view, written, started, waited = centre_transform(size), [], time.perf_counter(), 0.0
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with ProgressLine("drawing", first=0, total=len(targets), unit="image", hint="") as line, termination_as_interrupt():
        for done, (picture, file) in enumerate(targets, start=1):
            asked = time.perf_counter()
            try:
                read = read_image(picture.file)
            except UnreadableImageError as problem:
                logger.warning("%s: passed over, cannot be read: %s", _shown(picture.name), problem)
                continue
            image = to_device({"images": view(read)}, device)["images"]
            waited += time.perf_counter() - asked
            wanted: Query = _in_view(point, (read.height, read.width), size) if point is not None else query  # type: ignore[assignment]  # class or mean
            with autocast:
                panels = map_panels(
                    models, image, wanted, config.stages, at=config.at, grid=grid, colours="pca" in config.view
                )
            _write(file, draw_sheet(panels, title=picture.name.as_posix(), views=config.view))
            written.append(file)
            logger.info("%s: %s", _shown(file), _agreements(panels))
            seconds = time.perf_counter() - started
            line.update(done, images_per_second=done / seconds, data_wait=waited / seconds)
    if not written:
        raise UserError("--images", " ".join(config.images), "not one of them can be read; give other pictures")
    return written


def parse_point(text: str) -> tuple[int, int]:
    """``300,200`` as (x, y).

    Raises:
        UserError: anything else.
    """
    x, comma, y = text.partition(",")
    if not (comma and x.strip().isdecimal() and y.strip().isdecimal()):
        raise UserError("--point", text, "give x,y in pixels of the picture, e.g. 300,200")
    return int(x), int(y)


# --- files


def _targets(config: MapsConfig) -> list[tuple[PictureFile, Path]]:
    """The pictures, each with the file for its sheet."""
    out = Path(config.out)
    is_file = out.suffix.lower() == ".png" and not out.is_dir()
    pictures = find_pictures(config.images, out)
    if is_file and len(pictures) == 1:
        if out.resolve() == pictures[0].file.resolve():
            raise UserError("--out", out, "is the picture itself; give another file")
        _make_folder(out.parent)
        return [(pictures[0], out)]
    if is_file:
        out = out.with_suffix("")
        pictures = find_pictures(config.images, out)
        logger.info("%d pictures: their sheets go to the folder %s", len(pictures), out)
    _make_folder(out)
    for picture in pictures:
        if picture.name != picture.wanted:
            logger.info("%s is called %s: that name is taken", _shown(picture.file), _shown(picture.name))
    return [(picture, out / picture.name.with_suffix(".png")) for picture in pictures]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--out", folder, f"cannot be made a folder ({error.strerror}); give another") from error


def _write(file: Path, content: bytes) -> None:
    """A reader sees the old file or the new one, never a half-written one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.new")
    try:
        fresh.write_bytes(content)
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)


def _shown(name: Path) -> str:
    """On one line, and in letters that every console takes."""
    return " ".join(name.as_posix().encode(errors="backslashreplace").decode().splitlines())


# --- the point


def _holding(
    point: tuple[int, int], size: tuple[int, int], targets: Sequence[tuple[PictureFile, Path]]
) -> list[tuple[PictureFile, Path]]:
    """The pictures whose shown part holds the point, by their headers; the others are named in messages.

    Raises:
        UserError: none does.
    """
    kept, problem = [], None
    for picture, file in targets:
        sides = _sides(picture.file)
        found = None if sides is None else _outside(point, sides, size)
        if found is None:  # what cannot be read is met again, and said, when it is read
            kept.append((picture, file))
        else:
            problem = found
            logger.warning("%s: passed over, %s", _shown(picture.name), found)
    if not kept and problem is not None:
        raise UserError("--point", f"{point[0]},{point[1]}", problem)
    return kept


def _sides(file: Path) -> tuple[int, int] | None:
    """(height, width) of a picture upright, or None where its header cannot be read."""
    try:
        with Image.open(file) as opened:
            turned = opened.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # the EXIF orientations that lie on their side
            return (opened.width, opened.height) if turned else (opened.height, opened.width)
    except Exception:  # as in `data.images.read_image`
        return None


def _in_view(point: tuple[int, int], sides: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """The middle of a pixel of a picture in its centre view: `centre_transform` scales to cover, then cuts evenly."""
    scale = max(size[0] / sides[0], size[1] / sides[1])
    x, y = ((point[axis] + 0.5) * scale - (sides[1 - axis] * scale - size[1 - axis]) / 2 for axis in (0, 1))
    return x, y


def _outside(point: tuple[int, int], sides: tuple[int, int], size: tuple[int, int]) -> str | None:
    """Why a picture does not show the point, and what to do about it."""
    height, width = sides
    if not (point[0] < width and point[1] < height):
        return f"the picture is only {width} pixels wide and {height} high"
    x, y = _in_view(point, sides, size)
    if 0 <= x < size[1] and 0 <= y < size[0]:
        return None
    shape = f"{height}x{width}"
    return f"lies outside of the centre shown at {size[0]}x{size[1]}; take an --image-size of the picture's shape ({shape})"


def _agreements(panels: MapPanels) -> str:
    """The figures under the panels in one line."""
    names = list(panels.models)
    if len(names) == 1:
        return names[0]
    parts = []
    for name in names[1:]:
        agreement = panels.models[name].agreement
        numbers = "not compared" if agreement is None else " ".join(f"{value:.3f}" for value in agreement.tolist())
        parts.append(f"{name} {numbers}")
    return f"agreement with {names[0]} at stages {' '.join(map(str, panels.shown))}: {'; '.join(parts)}"
