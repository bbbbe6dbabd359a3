"""``embed``: pictures in, pooled or dense features with their file names out."""

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm.data
import torch
from torch.utils.data import DataLoader

from ..contracts import UserError
from ..data.datasets import ListedSet, SkippedList, listed_loader, to_device
from ..data.sources import ImageSource, Labels, open_source
from ..evaluation.embedding import EmbeddingFile, names_array
from ..models.adapters import check_plain, extract_features, nominal_size, patch_grid
from ..training.machine import choose_device, choose_precision, termination_as_interrupt
from ..training.progress import ProgressLine, show_messages
from .arguments import ModelConfig, parse_size

logger = logging.getLogger("vit_linearizer")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(ModelConfig):
    """Write features of pictures to an .npz file: names, pooled features, and dense ones when asked.

    Attributes:
        data: folder of images, searched recursively, or builtin:digits.
        out: the .npz file; a killed run of the same command goes on where it was.
        labels: folder where subfolders are classes, whose numbers are then written too.
        dense: add the features of every patch.
        image_size: 224 or HEIGHTxWIDTH; by default the model's nominal size.
        batch_size: images at a time.
        device: where to run.
        precision: arithmetic of the model; auto is bf16 where the device has it, else fp32. Features are written in fp32.
        num_workers: processes that load images.
        debug: show the traceback of an error.
    """

    data: str
    out: str
    labels: Labels = "none"
    dense: bool = False
    image_size: str | None = None
    batch_size: int = 32
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    num_workers: int = 0
    debug: bool = False

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')}", getattr(self, name), f"must be at least {least}")


def embed(config: EmbedConfig) -> Path:
    """Run a model over pictures; see `EmbedConfig`.

    Returns:
        The ``.npz``: ``names`` ``[N]``, ``pooled`` ``[N, D]`` (the mean final patch token, the feature of every accuracy
        in this project), with ``dense`` also ``dense`` ``[N, H, W, D]``, and ``labels`` ``[N]`` where the pictures have
        them. Rows stand in the order of the names; a picture that cannot be read has no row and is listed in
        ``OUT.skipped.txt``.

    Raises:
        UserError: anything in the configuration that cannot work; found before the first picture.
    """
    show_messages()
    device = choose_device(config.device)
    precision = choose_precision(device.type)[0] if config.precision == "auto" else config.precision
    source = open_source(config.data, config.labels)
    image_size = parse_size("--image-size", config.image_size)
    torch.manual_seed(0)  # of a model without weights, which has to be the same when a killed run goes on
    wanted: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    model = config.open(**wanted)
    check_plain(model, config.model, field="model")
    image_size = image_size or nominal_size(model)
    grid = patch_grid(model, image_size)
    settings = {
        "architecture": [repr(model), str(getattr(model, "flip", "")), str(timm.data.resolve_model_data_config(model))],
        "weights": _digest(part for name, value in model.state_dict().items() for part in (name.encode(), _bytes(value))),
        "data": config.data,
        "names": _digest(source.name(number).encode(errors="surrogateescape") for number in range(len(source))),
        "image_size": list(image_size),
        "dense": config.dense,
        "precision": precision,
    }
    file = EmbeddingFile(Path(config.out), settings)
    file.open()
    list_of_skipped = Path(f"{config.out}.skipped.txt")
    if file.done:
        logger.info("going on: %d of %d images are done", file.done, len(source))
    else:
        list_of_skipped.unlink(missing_ok=True)
    skipped = SkippedList(list_of_skipped)
    for name, reason in source.skipped:
        skipped.add(name, reason)

    dataset = ListedSet(source, np.arange(file.done, len(source)), image_size)
    loader = listed_loader(dataset, batch_size=config.batch_size, num_workers=config.num_workers)
    model.to(device)
    compute = functools.partial(
        _rows, model, source, device=device, precision=precision, grid=grid if config.dense else None
    )
    try:
        with termination_as_interrupt():
            _fill(file, loader, source, skipped, compute)
    finally:
        file.flush()
    rows = file.finish()
    unread = skipped.tidy()
    logger.info("%s: features of %d images at %dx%d", config.out, rows, *image_size)
    if unread:
        logger.warning("%d images could not be read: %s", len(unread), list_of_skipped)
    return Path(config.out)


def _fill(
    file: EmbeddingFile,
    loader: DataLoader,
    source: ImageSource,
    skipped: SkippedList,
    compute: Callable[[dict[str, Any]], dict[str, np.ndarray]],
) -> None:
    """All batches into the file, with progress."""
    first, started, waited = file.done, time.perf_counter(), 0.0
    with ProgressLine("embedding", first=first, total=len(source), unit="image") as line:
        asked = time.perf_counter()
        for batch in loader:
            waited += time.perf_counter() - asked
            for number, reason in batch["problems"]:
                skipped.add(source.name(number), reason)
            done = file.done + len(batch["numbers"]) + len(batch["problems"])
            file.append(compute(batch) if batch["numbers"] else {}, done)
            seconds = time.perf_counter() - started
            line.update(done, images_per_second=(done - first) / seconds, data_wait=waited / seconds)
            asked = time.perf_counter()


@torch.no_grad()
def _rows(
    model: torch.nn.Module,
    source: ImageSource,
    batch: dict[str, Any],
    *,
    device: torch.device,
    precision: str,
    grid: tuple[int, int] | None,
) -> dict[str, np.ndarray]:
    images = to_device({"images": batch["images"]}, device)["images"]
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = extract_features(model, images)
    rows = {"names": names_array([source.name(number) for number in batch["numbers"]])}
    rows["pooled"] = features.pooled.float().cpu().numpy()
    if grid is not None:
        rows["dense"] = features.tokens.float().unflatten(1, grid).cpu().numpy()
    if source.labels is not None:
        rows["labels"] = source.labels[batch["numbers"]]
    return rows


def _bytes(value: torch.Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _digest(parts: Iterable[bytes]) -> str:
    """Tells a killed run's model and pictures from others of the same name."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part + b"\0")
    return digest.hexdigest()
