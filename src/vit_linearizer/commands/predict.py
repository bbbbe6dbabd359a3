"""``predict``: a trained model and pictures in, answers out: best classes, or a label map with its picture and legend."""

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm.data
import torch
from PIL import Image

from ..contracts import UserError
from ..data.datasets import SkippedList, to_device
from ..data.images import UnreadableImageError, read_image
from ..data.picture_files import PictureFile, find_pictures
from ..data.segmentation import IGNORED, evaluation_view
from ..data.views import centre_transform
from ..evaluation.legend import with_legend
from ..evaluation.segmentation import labels_at, overlay, predict_logits
from ..models.adapters import nominal_size, normalize, patch_grid
from ..models.loading import open_model, probe_backbone
from ..models.segmenter_folder import SegmentationInfo, is_segmenter, load_segmenter
from ..training.machine import choose_device, choose_precision, termination_as_interrupt
from ..training.progress import ProgressLine, show_messages
from .arguments import parse_model_args, parse_size

logger = logging.getLogger("vit_linearizer")

#: How many classes the printed line of a segmented picture names.
_CLASSES_IN_A_LINE = 5
#: Characters of a class name in a legend.
_LONGEST_NAME = 40


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Answer pictures with a classifier or a segmentation model: the best classes, or a class for every pixel.

    Attributes:
        model: run folder, timm name, hf-hub:OWNER/NAME, local-dir:FOLDER, or a weight file (with --model-arch).
        images: files, and folders of images, searched recursively.
        out: folder for predictions.json and, of a segmentation model, NAME.labels.png and NAME.overlay.jpg of each picture;
            files of these names are replaced.
        model_arch: timm name of the architecture, when the model is a weight file.
        model_args: arguments of the architecture, as name=value (e.g. flip=released).
        model_pretrained: load a timm name's pretrained weights.
        image_size: of a classifier, 224 or HEIGHTxWIDTH; by default the model's nominal size. Segmentation runs have theirs.
        top: how many classes a classifier names.
        batch_size: pictures at a time.
        device: where to run.
        precision: arithmetic of the model; auto is bf16 where the device has it, else fp32.
        debug: show the traceback of an error.
    """

    model: str
    images: tuple[str, ...]
    out: str
    model_arch: str | None = None
    model_args: tuple[str, ...] = ()
    model_pretrained: bool = True
    image_size: str | None = None
    top: int = 5
    batch_size: int = 8
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    debug: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.images, str):
            raise UserError("images", self.images, "give a list of files and folders")
        for name in ("top", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')}", getattr(self, name), "must be at least 1")
        if not self.images:
            raise UserError("--images", None, "give at least one file or folder")


#: Pictures as they were read, with what they are called.
_Batch = Sequence[tuple[Path, Image.Image]]


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is to be done with the pictures.

    Attributes:
        answers: of a batch of pictures, each with what its picture is called, in any order.
        line: an answer in words.
    """

    answers: Callable[[_Batch], Iterator[tuple[Path, Any]]]
    line: Callable[[Any], str]


def predict(config: PredictConfig) -> dict[str, Any]:
    """Run a model over pictures; see `PredictConfig`.

    A picture from a folder keeps its path below that folder, one given as a file its name. Where two would differ in nothing
    but their suffix or the case of letters, the later one gets a number (``cat-2.png``), and a message says so. A file that
    two arguments name is taken once. What cannot be read is listed in ``OUT/skipped.txt``.

    Every file is written whole. When stopped, what is done is there, ``predictions.json`` included; the same command again
    does all of it again.

    Returns:
        What ``OUT/predictions.json`` holds, by the names of the pictures. Of a classifier: the ``top`` best classes, best
        first, as ``{"class": number, "name": its name, "score": softmax in percent}``. Of a segmentation model: the share
        of the picture's pixels in percent by class name, largest first, without classes that do not occur.

    Raises:
        UserError: anything in the configuration that cannot work, found before the first picture; or not one picture can
            be read.
    """
    show_messages()
    device = choose_device(config.device)
    precision = choose_precision(device.type)[0] if config.precision == "auto" else config.precision
    out = Path(config.out)
    pictures = find_pictures(config.images, out)
    torch.manual_seed(0)  # of a model without weights, whose answers mean nothing but should not change
    folder = config.model.removeprefix("local-dir:")
    open_work = _open_segmentation if is_segmenter(folder) else _open_classification
    work = open_work(config, device, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--out", out, f"cannot be made a folder ({error.strerror}); give another") from error
    list_of_skipped = out / "skipped.txt"
    list_of_skipped.unlink(missing_ok=True)
    skipped = SkippedList(list_of_skipped)
    for picture in pictures:
        if picture.name != picture.wanted:
            logger.info("%s is called %s: that name is taken", _shown(picture.file), _shown(picture.name))
    found: dict[str, Any] = {}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    try:
        with termination_as_interrupt(), torch.no_grad(), autocast:
            _answer_all(work, pictures, config.batch_size, found, skipped)
    finally:
        names = (picture.name.as_posix() for picture in pictures)
        found = {name: found[name] for name in names if name in found}
        if found:
            _write_whole(out / "predictions.json", functools.partial(_write_json, found))
        unread = skipped.tidy()
    if not found:
        raise UserError("--images", None, f"none of the {len(pictures)} images can be read; see {list_of_skipped}")
    logger.info("%s: predictions for %d images", out, len(found))
    if unread:
        logger.warning("%d images could not be read: %s", len(unread), list_of_skipped)
    return found


def _answer_all(
    work: _Work, pictures: Sequence[PictureFile], batch_size: int, found: dict[str, Any], skipped: SkippedList
) -> None:
    """All pictures, a batch at a time, into ``found`` by name, with progress."""
    started, waited = time.perf_counter(), 0.0
    with ProgressLine("predicting", first=0, total=len(pictures), unit="image", hint="") as line:
        for first in range(0, len(pictures), batch_size):
            batch = pictures[first : first + batch_size]
            asked = time.perf_counter()
            read = []
            for picture in batch:
                try:
                    read.append((picture.name, read_image(picture.file)))
                except UnreadableImageError as problem:
                    skipped.add(picture.name.as_posix(), str(problem))
            waited += time.perf_counter() - asked
            for name, answer in work.answers(read) if read else ():
                found[name.as_posix()] = answer
                logger.info("%s: %s", _shown(name), work.line(answer))
            done, seconds = first + len(batch), time.perf_counter() - started
            line.update(done, images_per_second=done / seconds, data_wait=waited / seconds)


def _shown(name: Path) -> str:
    """On one line, and in letters that every console takes."""
    return " ".join(name.as_posix().encode(errors="backslashreplace").decode().splitlines())


# --- classification


def _open_classification(config: PredictConfig, device: torch.device, _out: Path) -> _Work:
    given = parse_model_args("--model-args", config.model_args)
    size = parse_size("--image-size", config.image_size)
    wanted: dict[str, Any] = {}
    if size is not None:
        probe = probe_backbone(config.model, field="--model", architecture=config.model_arch, **given)
        wanted = {"img_size": size} if hasattr(probe, "patch_embed") else {}  # others take any size
    model: Any = open_model(
        config.model,
        field="--model",
        architecture=config.model_arch,
        pretrained=config.model_pretrained,
        **{**wanted, **given},
    ).eval()
    if not getattr(model, "num_classes", 0):
        raise UserError("--model", config.model, "has no classifier; run finetune or segment on it, and give that run")
    if getattr(model, "in_chans", 3) != 3:
        raise UserError("--model", config.model, f"takes {model.in_chans} channels; images have 3")
    patched = hasattr(getattr(model, "patch_embed", None), "patch_size")
    size = size or (nominal_size(model) if patched else timm.data.resolve_model_data_config(model)["input_size"][1:])
    assert size is not None
    if patched:
        patch_grid(model, size)
    names, short = _class_names(model)
    view, most = centre_transform(size), min(config.top, len(names))
    model.to(device)

    def answers(pictures: _Batch) -> Iterator[tuple[Path, Any]]:
        images = to_device({"images": torch.stack([view(picture) for _, picture in pictures])}, device)["images"]
        scores, numbers = (100 * model(normalize(model, images)).cpu().double().softmax(dim=-1)).topk(most)
        for (name, _), best in zip(pictures, zip(scores.tolist(), numbers.tolist(), strict=True), strict=True):
            yield (
                name,
                [{"class": number, "name": names[number], "score": score} for score, number in zip(*best, strict=True)],
            )

    def line(best: Any) -> str:
        return ", ".join(f"{short[each['class']]} {each['score']:.1f}" for each in best)

    return _Work(answers=answers, line=line)


def _class_names(model: Any) -> tuple[list[str], list[str]]:
    """The model's own names of its classes; else timm's of an ImageNet with as many; else numbers. And the same, short."""
    own, numbers = model.pretrained_cfg.get("label_names"), range(model.num_classes)
    if isinstance(own, dict):
        own = [own.get(number, own.get(str(number), number)) for number in numbers]
    if own is None or len(own) != len(numbers):  # names of another head say nothing of this one
        subset = timm.data.infer_imagenet_subset(model)
        if subset:
            info = timm.data.ImageNetInfo(subset)
            names = [info.index_to_description(number) for number in numbers]
            return names, [name.partition(",")[0] for name in names]  # they are lists of synonyms
        own = numbers
    return [str(name) for name in own], [str(name) for name in own]


# --- segmentation


def _open_segmentation(config: PredictConfig, device: torch.device, out: Path) -> _Work:
    given = {"--image-size": config.image_size, "--model-arch": config.model_arch}
    for flag, value in {**given, "--model-args": " ".join(config.model_args) or None}.items():
        if value is not None:
            raise UserError(flag, value, f"{config.model} is a segmentation run and has its own; leave this out")
    segmenter, info = load_segmenter(config.model.removeprefix("local-dir:"), name="--model")
    if len(info.classes) > IGNORED:
        raise UserError("--model", config.model, f"has {len(info.classes)} classes; label maps hold {IGNORED}")
    segmenter.to(device)
    crop = _pair(info.extra.get("crop")) or nominal_size(segmenter.backbone)
    resize, stride = (_pair(info.extra.get(key)) for key in ("resize", "stride"))
    mode = info.extra.get("mode", "whole")

    def answers(pictures: _Batch) -> Iterator[tuple[Path, Any]]:
        by_size: dict[torch.Size, list[tuple[torch.Tensor, Path, Image.Image]]] = {}
        for name, picture in pictures:
            view = evaluation_view(picture, crop, resize)
            by_size.setdefault(view.shape, []).append((view, name, picture))
        for items in by_size.values():
            images = torch.stack([view for view, _, _ in items]).to(device).float() / 255
            logits = predict_logits(segmenter, images, crop=crop, stride=stride, mode=mode)
            for scores, (_, name, picture) in zip(logits, items, strict=True):
                labels = labels_at(scores, (picture.height, picture.width)).cpu().numpy().astype(np.uint8)
                yield name, _write_segmented(out / name, picture, labels, info)

    def line(shares: Any) -> str:
        return ", ".join(f"{name} {share:.1f}" for name, share in list(shares.items())[:_CLASSES_IN_A_LINE])

    return _Work(answers=answers, line=line)


def _pair(value: Any) -> tuple[int, int] | None:
    return None if value is None else (int(value[0]), int(value[1]))


def _write_segmented(path: Path, picture: Image.Image, labels: np.ndarray, info: SegmentationInfo) -> dict[str, float]:
    """Label map and overlay of one picture beside ``path``; returns the shares of its classes in percent."""
    counts = np.bincount(labels.ravel(), minlength=len(info.classes))
    order = [int(number) for number in np.argsort(-counts, kind="stable") if counts[number]]
    share = {number: 100 * float(counts[number]) / labels.size for number in order}
    label_map = Image.fromarray(labels)
    # With fewer colours Pillow would pack them into fewer bits, which not every reader of masks unpacks.
    label_map.putpalette([value for colour in info.palette for value in colour] + [0] * 3 * (256 - len(info.palette)))
    _write_whole(_beside(path, ".labels.png"), lambda file: label_map.save(file, format="PNG"))
    rows = [(f"{_cut(info.classes[number])}  {share[number]:.1f} %", info.palette[number]) for number in order]
    drawn = with_legend(overlay(picture, labels, info.palette), rows)
    _write_whole(_beside(path, ".overlay.jpg"), lambda file: drawn.save(file, format="JPEG", quality=90))
    shares: dict[str, float] = {}
    for number in order:  # two classes may bear one name
        shares[info.classes[number]] = shares.get(info.classes[number], 0.0) + share[number]
    return dict(sorted(shares.items(), key=lambda each: -each[1]))


def _cut(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


# --- files


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.stem + suffix)


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """A reader sees the old file or the new one, never a half-written one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    try:
        write(fresh)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _write_json(values: dict[str, Any], file: Path) -> None:
    # Bytes of a file name that are no UTF-8 become JSON's own escapes.
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8", errors="backslashreplace")
