"""Map sheets for a report: students beside their teacher on a few held-out images, from files of this disk alone.

Which images is a fixed rule: at most four, evenly spread over the held-out part in its order, that of the runs' seed. The
first is shown at every stage, the others at the last. The query is the mean patch token, the feature of every accuracy here.
Nothing is fetched, and it takes no longer than `_SECONDS`, give or take a picture.
"""

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.datasets import split_held_out
from ..data.images import UnreadableImageError
from ..data.sources import ImageSource, open_source
from ..data.views import centre_transform
from ..models.loading import load, model_folder
from ..models.teacher import load_teacher
from .run_record import RunRecord, number

_PICTURES = 4
_STUDENTS = 3
_STAGES = 4
_SECONDS = 10.0
#: Opening a folder looks at every file in it.
_MOST_IMAGES = 20_000
_DPI = 90


@dataclass(frozen=True, kw_only=True)
class MapPictures:
    """The sheets, and a sentence on why there are none or fewer; empty where nothing is missing.

    Attributes:
        pictures: (caption, WebP file) of each.
        missing: the sentence.
    """

    pictures: tuple[tuple[str, bytes], ...] = ()
    missing: str = ""


def map_pictures(runs: Sequence[RunRecord]) -> MapPictures:
    """Sheets of the first distillation's teacher and of all students of it, up to three, on their held-out images.

    Args:
        runs: of a report.
    """
    distilled = [run for run in runs if run.command == "distill"]
    if not distilled:
        return MapPictures(missing="Maps compare a student with its teacher; none of these runs is a distillation.")
    distilled.sort(key=lambda run: run.is_baseline)
    first = distilled[0]
    alike = [run for run in distilled if _sees(run) == _sees(first) and model_folder(run.path) is not None][:_STUDENTS]
    by_hand = "vit-linearizer maps draws them for pictures of your choice."
    if not alike:
        return MapPictures(missing=f"No maps: no run has saved a model yet. {by_hand}")
    teacher = _teacher_file(first)
    if teacher is None:
        return MapPictures(missing=f"No maps: the teacher {first.config.get('teacher')} is not on this disk. {by_hand}")
    try:
        return _draw(alike, teacher, by_hand)
    except Exception as error:  # whatever a model or picture cannot do, the report comes about without maps
        return MapPictures(missing=f"No maps: {' '.join(str(error).split())} {by_hand}")


def _sees(run: RunRecord) -> tuple[str, ...]:
    """What has to agree for models to stand on one sheet."""
    names = ("teacher", "teacher_arch", "data", "seed", "image_size", "teacher_image_size", "images")
    return tuple(str(run.config.get(name)) for name in names)


def _teacher_file(run: RunRecord) -> Path | None:
    """The teacher of a run where it lies on this disk: where the run says, or under a folder above the run."""
    teacher = run.config.get("teacher")
    if not isinstance(teacher, str) or not teacher:
        return None
    name = teacher.removeprefix("local-dir:")
    for base in (Path(), *run.path.resolve().parents):
        place = base / name
        if model_folder(place) is not None or (place.is_file() and run.config.get("teacher_arch")):
            return place
    beside = run.path.resolve().parent / Path(name).name
    return beside if model_folder(beside) is not None else None


def _draw(runs: Sequence[RunRecord], teacher_file: Path, by_hand: str) -> MapPictures:
    from .activation_maps import map_panels
    from .map_sheet import draw_sheet

    started, config = time.perf_counter(), runs[0].config
    images = number(config.get("images")) or 0
    data = str(config.get("data"))
    if images > _MOST_IMAGES:
        return MapPictures(
            missing=f"No maps: {data} holds so many images that looking for the held-out ones takes long. {by_hand}"
        )
    source = open_source(data)
    if len(source) != images:
        return MapPictures(missing=f"No maps: {data} no longer holds the images of the run. {by_hand}")
    held_out = split_held_out(len(source), int(config["seed"]))[1]
    size, teacher_size = (
        (int(height), int(width)) for height, width in (config["image_size"], config["teacher_image_size"])
    )
    architecture = config.get("teacher_arch")
    teacher = load_teacher(str(teacher_file), image_size=teacher_size, architecture=architecture).model
    models = {f"teacher: {teacher_file.resolve().name}": teacher, **{run.name: load(run.path) for run in runs}}
    pictures: list[tuple[str, bytes]] = []
    for place in np.unique(np.linspace(0, len(held_out) - 1, min(_PICTURES, len(held_out))).round().astype(int)):
        if time.perf_counter() - started > _SECONDS:
            return MapPictures(
                pictures=tuple(pictures), missing=f"Fewer maps than four, to keep the report quick. {by_hand}"
            )
        index = int(held_out[place])
        picture = _read(source, index)
        if picture is not None:
            at = range(1, _STAGES + 1) if not pictures else (_STAGES,)  # all stages of one picture say enough
            image = centre_transform(size)(picture).float() / 255
            panels = map_panels(models, image, "mean", _STAGES, at=list(at), colours=True)
            sheet = draw_sheet(panels, title=source.name(index), views=("heat", "pca"), dpi=_DPI)
            said = f"{source.name(index)}. From left to right: the picture, the teacher, each student. A row is a stage."
            pictures.append((said, _small(sheet)))
    return MapPictures(pictures=tuple(pictures), missing="" if pictures else "No maps: no held-out image could be read.")


def _read(source: ImageSource, index: int) -> Image.Image | None:
    try:
        return source.read(index)
    except UnreadableImageError:
        return None


def _small(png: bytes) -> bytes:
    """The same picture as WebP: a tenth of the bytes, and nothing that the eye misses."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(png)) as opened:
        opened.convert("RGB").save(file, "WEBP", quality=88)
    return file.getvalue()
